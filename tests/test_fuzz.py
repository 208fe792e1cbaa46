"""A sample of `make fuzz`, and that it sees what it looks for."""

import hashlib
from pathlib import Path

import pytest
from fuzz import run
from fuzz.mutations import bombs, cases
from fuzz.originals import originals, small_mae

COUNT = 150


def test_bombs_and_mutated_inputs_end_in_a_result_a_named_skip_or_a_sentence() -> None:
    outcomes, faults = run.run(seed=1, count=COUNT)
    assert faults == []
    assert sum(outcomes.values()) == COUNT > len(bombs()) + len(originals())
    assert set(outcomes) == {"read", "loaded", "skipped by name", "one sentence"}


def test_inputs_follow_from_the_seed() -> None:
    def digests(seed: int) -> list[str]:
        return [hashlib.sha256(repr(case).encode()).hexdigest() for case in list(cases(originals(), seed, COUNT))[len(bombs()) :]]

    assert digests(1) == digests(1)
    assert len(set(digests(1)) - set(digests(2))) == COUNT - len(bombs())


def test_every_original_is_sound(tmp_path) -> None:
    model = small_mae()
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for number, (name, original) in enumerate(originals().items()):
        folder = tmp_path / str(number)
        for file, content in original.files.items():
            (folder / file).parent.mkdir(parents=True, exist_ok=True)
            (folder / file).write_bytes(content)
        if original.kind == "images":
            expected = "skipped by name" if name in ("gnu.tar", "pax.tar") else "read"  # which hold a broken image
            assert run.read_images(folder / original.opened, original.channels) == expected, name
        else:
            assert run.load_checkpoint(folder / original.opened, model, state) == "loaded", name


def test_the_watch_sees_what_is_written_and_run(tmp_path) -> None:
    watch = run.Watch()
    watch.active = True
    Path(tmp_path / "a").write_bytes(b"")
    Path(tmp_path / "a").read_bytes()
    exec("import os; os.system('true')")
    watch.active = False
    Path(tmp_path / "b").write_bytes(b"")
    assert watch.seen == [f"opened {tmp_path / 'a'} for writing", "os.system"]


@pytest.mark.parametrize("text", ["", "a\nb", "<_io.BytesIO object at 0x7f>", "a" * 1000])
def test_what_is_no_sentence(text) -> None:
    with pytest.raises(AssertionError, match="no clear sentence"):
        run.check_sentence(text)
