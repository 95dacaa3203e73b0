"""Windows measured by Ray's workers: the same figures as here, resumable, and errors that say what is wrong."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from tiny_models import write_tokenizer

from skv_export.analysis import measurement
from skv_export.checkpoints.checkpoint import resolve
from skv_export.cli.main import main
from skv_export.errors import SkvError
from skv_export.evaluation import comparison
from skv_export.evaluation.candidates import parse_configs
from skv_export.evaluation.ray_workers import RayWorkers
from skv_export.evaluation.text import read_text
from skv_export.spec.recipe import LayerConfig, Recipe

pytest.importorskip("ray")
pytestmark = pytest.mark.slow  # a worker loads torch anew
TEXT = read_text(None)[:6000]


@pytest.fixture(scope="module")
def cluster() -> Iterator[str]:
    """The address of a cluster of one node."""
    from ray.cluster_utils import Cluster

    nodes = Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
    yield nodes.address
    nodes.shutdown()


@pytest.fixture
def checkpoint(tiny_checkpoint: Callable[..., Path], tmp_path: Path) -> Path:
    folder = shutil.copytree(tiny_checkpoint("qwen3"), tmp_path / "qwen3")
    write_tokenizer(folder, 320)
    return folder


def test_workers_measure_what_is_measured_here(cluster: str, checkpoint: Path, tmp_path: Path) -> None:
    source, state = resolve(checkpoint), tmp_path / "state.jsonl"
    options: dict[str, Any] = {"windows": 3, "window": 160}
    here = comparison.run(source, parse_configs("K4V2,K2V2", Recipe()), TEXT, **options)
    comparison.run(source, parse_configs("K4V2,K2V2", Recipe()), TEXT, first=1, state=state, **options)
    seen: list[int] = []
    with comparison.ray_workers(cluster, source) as workers:
        assert len(workers) == 1
        there = comparison.run(
            source,
            parse_configs("K4V2,K2V2", Recipe()),
            TEXT,
            state=state,
            workers=workers,
            progress=lambda _, done, __: seen.append(done),
            **options,
        )
    assert seen == [3, 4, 5, 6]  # the first window was finished
    for ours, theirs in zip(here.rows, there.rows, strict=True):
        assert ours.name == theirs.name and ours.effective_bits == theirs.effective_bits
        assert theirs.kld_mean == pytest.approx(ours.kld_mean, rel=1e-4)
        assert theirs.ppl == pytest.approx(ours.ppl, rel=1e-5)


def test_analyze_measures_there(cluster: str, checkpoint: Path, tmp_path: Path) -> None:
    source, state = resolve(checkpoint), tmp_path / "state.jsonl"
    options: dict[str, Any] = {"base": LayerConfig(), "choices": [2, 4], "windows": 2, "window": 200}
    here = measurement.measure(source, TEXT, **options)
    with measurement.ray_workers(cluster, source) as workers:
        there = measurement.measure(source, TEXT, workers=workers, state=state, **options)
    for name in ("output_error", "loss", "geometry_k", "geometry_v"):
        np.testing.assert_allclose(getattr(there, name), getattr(here, name), rtol=1e-3)
    again = measurement.measure(source, TEXT, state=state, **options)  # from what was kept
    np.testing.assert_array_equal(again.loss, there.loss)


def test_what_runs_here_alone_is_refused(checkpoint: Path) -> None:
    for command, option, message in (("quality", "--needles", "--needles too"), ("analyze", "--kl", "--kl and --ray")):
        result = CliRunner().invoke(main, [command, str(checkpoint), option, "--ray", "local"])
        assert result.exit_code == 1 and message in result.output


def test_errors_of_workers_and_clusters(cluster: str) -> None:
    def fail(model: str, item: int) -> int:
        if item == 2:
            raise SkvError(f"{model}: window {item}", got="nothing")
        raise ZeroDivisionError("somewhere")

    with RayWorkers(cluster, lambda placement: placement.device) as workers:
        with pytest.raises(SkvError, match="cpu: window 2; got nothing"):
            list(workers.map(fail, [2]))
        with pytest.raises(SkvError, match="a worker failed; got somewhere"):
            list(workers.map(fail, [1]))
        assert sorted(workers.map(lambda model, item: item * item, range(5))) == [(i, i * i) for i in range(5)]
    with pytest.raises(SkvError, match="no cluster answers"), RayWorkers("127.0.0.1:1", lambda placement: 0):
        pass
