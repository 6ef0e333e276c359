"""Students that ship beside the embedded model: read, refused, drawn by the demo, and gone without a trace."""

from __future__ import annotations

import json

import pytest
import torch
from typer.testing import CliRunner

import flexclear
from flexclear import cli, embedded
from flexclear.distill.students import trained_parameters
from flexclear.embedded import students
from flexclear.embedded.evaluation import generate, held_out_requests, picture_psnr
from flexclear.embedded.fingerprint import students_fingerprint, teacher_fingerprint
from flexclear.embedded.students import Student, as_student, read_students, write_index
from flexclear.embedded.vocabulary import read_vocabulary
from flexclear.weights import files

PROMPT = "a rocket on a yellow background"


def make(folder, radius, down_factor=None):
    """A student whose attention is a little off the teacher's."""
    pipe = embedded.pipeline()
    flexclear.transform(pipe, r=radius, down_factor=down_factor, backend="sdpa")
    generator = torch.Generator().manual_seed(radius)
    with torch.no_grad():
        for parameter in trained_parameters(pipe.transformer).values():
            parameter.add_(0.02 * torch.randn(parameter.shape, generator=generator))
    path = folder / students.file_name(radius, down_factor)
    flexclear.save_weights(pipe, path, base="flexclear.embedded")
    return Student(path, radius, down_factor)


@pytest.fixture
def shipped(tmp_path, monkeypatch):
    """A folder of two students in the place of the package's own."""
    folder = tmp_path / "students"
    made = [make(folder, 4), make(folder, 2, 4)]
    write_index(folder, made, teacher_fingerprint())
    for module in (students, files):
        monkeypatch.setattr(module, "students_directory", lambda: folder)
    return folder


def draw(pipe):
    return pipe(
        PROMPT, height=64, width=64, num_inference_steps=2, max_sequence_length=16, output_type="pt",
        generator=torch.Generator().manual_seed(0),
    ).images  # fmt: skip


def test_students_are_read_by_radius(shipped):
    found = read_students()
    assert [(student.path.name, student.radius, student.down_factor) for student in found] == [
        ("clear_local_2_down_4.safetensors", 2, 4),
        ("clear_local_4.safetensors", 4, None),
    ]
    assert [student.label for student in found] == ["r = 2 + pooled 4 x 4, distilled", "r = 4, distilled"]
    assert read_students(shipped / "nowhere") == ()


def test_students_of_another_teacher_are_refused(shipped, tmp_path):
    index = shipped / students.INDEX
    content = json.loads(index.read_text())
    index.write_text(json.dumps({**content, "teacher": "another"}))
    with pytest.raises(ValueError, match=f"another teacher .another, the model here is {teacher_fingerprint()}"):
        read_students()
    assert len(read_students(of_any_teacher=True)) == 2
    index.write_text("{}")
    with pytest.raises(ValueError, match="not an index of students"):
        read_students()
    index.write_text(json.dumps(content))
    (shipped / "clear_local_4.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"clear_local_4\.safetensors, which is missing"):
        read_students()
    for fingerprint in (teacher_fingerprint, students_fingerprint):
        with pytest.raises(FileNotFoundError, match="no weights in"):
            fingerprint(tmp_path / "nowhere")


def test_other_students_have_another_fingerprint(shipped):
    assert students_fingerprint() != (first := students_fingerprint(shipped))
    assert students_fingerprint(shipped) == first
    make(shipped, 3)
    assert students_fingerprint(shipped) != first
    (shipped / "clear_local_3.safetensors").unlink()
    assert students_fingerprint(shipped) == first


def test_students_are_weights_that_can_be_named(shipped, tmp_path, monkeypatch):
    pipe = embedded.pipeline()
    loaded = flexclear.load_weights(pipe, "embedded", filename="clear_local_2_down_4.safetensors")
    assert (loaded.radius, loaded.down_factor) == (2, 4)
    out = tmp_path / "out"
    options = ["--prompt", PROMPT, "--out", str(out), "--steps", "1", "--size", "64x64", "--text-len", "16"]
    done = CliRunner().invoke(
        cli.app, ["generate", "embedded", "--weights", "embedded:clear_local_4.safetensors", *options]
    )
    assert done.exit_code == 0, done.output
    assert len(list(out.glob("*.png"))) == 1
    with pytest.raises(FileNotFoundError, match=r"no file .*clear_local_9\.safetensors.*clear_local_4\.safetensors"):
        flexclear.load_weights(pipe, "embedded", filename="clear_local_9.safetensors")
    # A folder of that name is what the name means, as for every folder.
    monkeypatch.chdir(tmp_path)
    (tmp_path / "embedded").mkdir()
    with pytest.raises(FileNotFoundError, match=r"no file embedded/clear_local_4\.safetensors"):
        flexclear.load_weights(pipe, "embedded", filename="clear_local_4.safetensors")


def test_what_ships_is_nearer_to_the_model_that_ships_than_its_own_weights_are():
    found = read_students()
    assert {(student.radius, student.down_factor) for student in found} == {(4, None), (4, 4), (8, None), (16, None)}
    assert sum(student.path.stat().st_size for student in found) <= students.LARGEST_BYTES
    vocabulary = read_vocabulary(embedded.model_directory())
    requests = held_out_requests(vocabulary, 1, seed=7)[::20]

    def drawn(pipe):
        return generate(pipe, vocabulary, requests, steps=4, pixels=256)

    plain = drawn(embedded.pipeline())
    for student in found:
        pipe = embedded.pipeline()
        flexclear.transform(pipe, r=student.radius, down_factor=student.down_factor, backend="sdpa")
        own = drawn(pipe)
        flexclear.load_weights(pipe, student.path)
        distilled, undistilled = (picture_psnr(pictures, plain).mean().item() for pictures in (drawn(pipe), own))
        assert distilled > undistilled + 2, student.label


def test_an_index_forgets_files_that_it_no_longer_names_and_limits_their_size(shipped, monkeypatch):
    (student, other) = read_students()
    write_index(shipped, [student], teacher_fingerprint())
    assert not other.path.exists()
    assert read_students() == (student,)
    monkeypatch.setattr(students, "LARGEST_BYTES", 1000)
    with pytest.raises(ValueError, match="at most 1000 ship"):
        write_index(shipped, [student], teacher_fingerprint())


def test_a_pipeline_is_a_student_inside_the_block_and_the_teacher_after_it(shipped):
    pipe = embedded.pipeline()
    pipe.set_progress_bar_config(disable=True)
    before = {name: tensor.clone() for name, tensor in pipe.transformer.state_dict().items()}
    dense = draw(pipe)
    for student in read_students():
        expected = embedded.pipeline()
        expected.set_progress_bar_config(disable=True)
        flexclear.load_weights(expected, student.path)
        with as_student(pipe, student):
            drawn = draw(pipe)
        assert torch.equal(drawn, draw(expected))
        assert (drawn - dense).abs().max() > 1e-2
    after = pipe.transformer.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(tensor, before[name]) for name, tensor in after.items())
    assert torch.equal(draw(pipe), dense)
    with pytest.raises(FileNotFoundError), as_student(pipe, Student(shipped / "gone.safetensors", 3)):
        pass
    assert torch.equal(draw(pipe), dense)


def demo(out, *options):
    with pytest.raises(SystemExit) as end:
        cli.main(["demo", "--prompt", PROMPT, "--steps", "2", "--size", "64", "--out", str(out), *options])
    assert not end.value.code
    return (out / "table.md").read_text()


@pytest.mark.kept
def test_the_demo_draws_shipped_students_beside_the_weights_that_never_saw_the_window(shipped, tmp_path, capsys):
    table = demo(tmp_path / "out")
    assert [line.split(" | ")[0] for line in table.splitlines()[2:]] == [
        "| dense", "| 2", "| 4", "| 2 + pooled 4 x 4, distilled", "| 4, distilled",
    ]  # fmt: skip
    plain, distilled = (
        next(li for li in table.splitlines() if li.startswith(f"| {n} |")) for n in ("4", "4, distilled")
    )
    assert plain.split(" | ")[1:3] == distilled.split(" | ")[1:3]
    assert plain.split(" | ")[3] != distilled.split(" | ")[3]
    assert "distilled" not in demo(tmp_path / "other", "--r", "3")
    capsys.readouterr()
    index = shipped / students.INDEX
    index.write_text(index.read_text().replace(teacher_fingerprint(), "another"))
    assert "distilled" not in demo(tmp_path / "another", "--r", "4")
    assert "Without distilled weights: the students in" in capsys.readouterr().err
