"""Students of the embedded model: attention weights distilled for a window, shipped with the teacher."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from flexclear.common.shipped import students_directory
from flexclear.compile.files import whole_file
from flexclear.compile.undoing import numbers_as_before
from flexclear.convert import transform
from flexclear.embedded.fingerprint import teacher_fingerprint
from flexclear.families import family_of
from flexclear.families.target import model_of
from flexclear.runtime.exchange import as_before
from flexclear.weights import keys, load_weights

INDEX = "students.json"
LARGEST_BYTES = 5_000_000
"""Maximum size of all students together in the package."""


@dataclass(frozen=True)
class Student:
    """One weights file in the released format.

    Attributes:
        path: the file.
        radius: the window's radius, in tokens.
        down_factor: side of the pooled cells in tokens; None without them.
    """

    path: Path
    radius: int
    down_factor: int | None = None

    @property
    def label(self) -> str:
        pooled = "" if self.down_factor is None else f" + pooled {self.down_factor} x {self.down_factor}"
        return f"r = {self.radius}{pooled}, distilled"


def file_name(radius: int, down_factor: int | None = None) -> str:
    """Name of the released file for this window."""
    return f"clear_local_{radius}{'' if down_factor is None else f'_down_{down_factor}'}.safetensors"


def write_index(folder: Path, students: Sequence[Student], teacher: str) -> Path:
    """Write the index of the students in ``folder`` and their teacher. Delete files that only an older index names.

    Args:
        folder: holds the students' files.
        students: the students.
        teacher: see ``teacher_fingerprint``.

    Raises:
        ValueError: together they are larger than ``LARGEST_BYTES``.
    """
    size = sum(student.path.stat().st_size for student in students)
    if size > LARGEST_BYTES:
        raise ValueError(f"{len(students)} students take {size} bytes, at most {LARGEST_BYTES} ship with the package")
    index = folder / INDEX
    before = json.loads(index.read_text(encoding="utf-8"))["students"] if index.is_file() else []
    entries = [{**asdict(student), "path": student.path.name} for student in students]
    with whole_file(index) as beside:
        beside.write_text(json.dumps({"teacher": teacher, "students": entries}, indent=1) + "\n", encoding="utf-8")
    for gone in {entry["path"] for entry in before} - {entry["path"] for entry in entries}:
        (folder / gone).unlink(missing_ok=True)
    return index


def read_students(folder: Path | None = None, of_any_teacher: bool = False) -> tuple[Student, ...]:
    """The students in a folder (by default the package's), sorted by radius. Empty if there is no folder.

    ``of_any_teacher`` also reads students of an earlier embedded model, to distill them again.

    Raises:
        ValueError: they were distilled from a teacher other than the embedded model, or the index is damaged.
        FileNotFoundError: the index names a file that is missing.
    """
    folder = students_directory() if folder is None else folder
    index = folder / INDEX
    if not index.is_file():
        return ()
    try:
        content = json.loads(index.read_text(encoding="utf-8"))
        teacher = content["teacher"]
        found = [Student(folder / e["path"], e["radius"], e["down_factor"]) for e in content["students"]]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{index} is not an index of students: {error}") from error
    if not of_any_teacher and teacher != (ours := teacher_fingerprint()):
        raise ValueError(f"the students in {folder} learned from another teacher ({teacher}, the model here is {ours})")
    for student in found:
        if not student.path.is_file():
            raise FileNotFoundError(f"{index} names {student.path.name}, which is missing")
    return tuple(sorted(found, key=lambda student: (student.radius, student.down_factor or 0)))


@contextlib.contextmanager
def as_student(pipe: Any, student: Student) -> Iterator[None]:
    """Run a dense embedded pipeline with the student's window and weights inside the block; restore it afterwards.

    Raises:
        ValueError: the file does not fit the model.
    """
    model = model_of(pipe)
    projections = keys.projections(model, list(family_of(model).layers(model)))
    with numbers_as_before(projections.values()), as_before(model):
        transform(pipe, r=student.radius, down_factor=student.down_factor)
        load_weights(pipe, student.path)
        yield
