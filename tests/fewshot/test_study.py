"""Studies: cells that are run once, by one process or several, and read as they were written."""

from concurrent.futures import ThreadPoolExecutor
from threading import Barrier

import numpy as np
import pytest
import torch
from filelock import Timeout

import reftheads.fewshot as fs

CELLS = [
    {"model": "some/path", "mode": mode, "k": k, "seed": seed} for mode in ("a", "b") for k in (1, 8) for seed in (0, 1)
]


def test_a_study_that_stops_goes_on_without_losing_or_repeating_a_cell(tmp_path):
    ran = []

    def measure(model, mode, k, seed):
        if len(ran) == 3:
            raise KeyboardInterrupt
        ran.append((mode, k, seed))
        return {"score": k + seed + (mode == "b")}

    study = fs.Study(tmp_path / "results")
    with pytest.raises(KeyboardInterrupt):
        study.run(CELLS, measure)
    assert len(list((tmp_path / "results").glob("*.json"))) == 3
    ran_before, ran[:] = list(ran), []
    with pytest.raises(KeyboardInterrupt):
        study.run(CELLS, measure)
    results = fs.Study(tmp_path / "results").run(
        CELLS, lambda **cell: {"score": cell["k"] + cell["seed"] + (cell["mode"] == "b")}
    )
    assert not set(ran) & set(ran_before)
    assert [result["score"] for result in results] == [1, 2, 8, 9, 2, 3, 9, 10]
    assert fs.over_seeds(results, ["mode"], "k")["b",][8] == (9.5, pytest.approx(0.5**0.5))
    table = fs.table_of(results, ["model", "mode"], "k")
    assert list(table.columns[0].cells) == ["path", "path"] and list(table.columns[3].cells)[0] == "8.500 ± 0.707"
    fs.plot(results, tmp_path / "plot.png", ["mode"])
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")


def test_settings_of_a_study_stand_in_its_files_and_others_are_not_mixed_with_them(tmp_path):
    results = fs.Study(tmp_path, steps=30).run(CELLS[:1], lambda **cell: {"score": 1})
    assert results == [{**CELLS[0], "steps": 30, "score": 1}]
    with pytest.raises(ValueError, match="of another run, with {'steps': 30}: take another folder"):
        fs.Study(tmp_path, steps=60).run(CELLS[:1], lambda **cell: {"score": 2})


def test_settings_and_scores_of_a_study_are_read_as_they_were_given(tmp_path):
    study = fs.Study(tmp_path, factors=(0.3, 1))
    found = study.run(CELLS[:2], lambda **cell: {"score": np.float32(0.5), "loss": torch.tensor(2.0)})
    assert found == fs.Study(tmp_path, factors=(0.3, 1)).run(CELLS[:2], lambda **cell: pytest.fail("ran again"))
    assert (found[0]["score"], found[0]["loss"]) == (0.5, 2)
    with pytest.raises(ValueError, match="of another run, with {'steps': None}: take another folder"):
        fs.Study(tmp_path, steps=60).result(CELLS[0])

    def wait(**cell):
        raise Timeout("something else")

    with pytest.raises(Timeout, match="something else"):
        study.run(CELLS[2:], wait)


def test_two_who_run_a_study_at_the_same_time_share_its_cells(tmp_path):
    both = Barrier(2, timeout=60)

    def run(_):
        ran = []

        def measure(**cell):
            if not ran:
                both.wait()  # nobody goes on before both have a cell
            ran.append(cell)
            return {"score": cell["k"]}

        return ran, fs.Study(tmp_path).run(CELLS, measure)

    with ThreadPoolExecutor(2) as pool:
        (first, results), (second, again) = pool.map(run, range(2))
    assert first and second and sorted(map(str, first + second)) == sorted(map(str, CELLS))
    assert results == again and [result["score"] for result in results] == [cell["k"] for cell in CELLS]


def test_files_of_a_study_that_are_damaged_or_of_other_cells_are_errors(tmp_path):
    study = fs.Study(tmp_path)
    study.run([{"model": "a/b", "k": 1}], lambda **cell: {"score": 0})
    with pytest.raises(ValueError, match="is the result of another run, with {'model': 'a/b'}: take another folder"):
        study.result({"model": "a-b", "k": 1})
    study.path({"model": "a/b", "k": 1}).write_text("{")
    with pytest.raises(ValueError, match="is damaged"):
        study.result({"model": "a/b", "k": 1})
    with pytest.raises(ValueError, match="no results"):
        fs.over_seeds([], ["model"], "k")
