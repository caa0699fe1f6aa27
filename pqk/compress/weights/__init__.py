"""Quantizes the weights of any torch model, really packed: schemes, quantizers, packed layers, files, methods."""
