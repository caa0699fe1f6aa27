"""Puts toolchains behind one interface. This package never imports pqk and could be published alone."""
