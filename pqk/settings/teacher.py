"""Defines the Teacher of a project, `configs/teacher.yaml`: the model of all cards unless --model names another."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from pqk.settings.yamlfile import Spec, config_loader


class DefaultTeacher(Spec):
    """The shipped Teacher, and the file for its training."""

    version: Annotated[str, Field(pattern=r"^\d+\.\d+$")]
    family: Annotated[str, Field(min_length=1)]
    # folder or file below the project's root, or random:NAME; of that family
    model: Annotated[str, Field(min_length=1)]
    training: Annotated[str, Field(min_length=1)]  # file of `pqk train teacher`


load_teacher_settings = config_loader(DefaultTeacher, "teacher")
