"""The benchmark's arithmetic, that it runs, and that a wrong result cannot pass."""

import json
from pathlib import Path

import jax
import numpy as np
import pytest
from PIL import Image
from small import small
from untrained_run import make_run

from cxai_jax import models
from experiments import curve_cost, gpu_report, growth, scaling
from tools import (
    benchmark,
    benchmark_compare,
    benchmark_parts,
    benchmark_peer,
    benchmark_suites,
    benchmark_timing,
    benchmark_voting,
    roofline,
    startup,
    throughput,
    throughput_training,
)
from tools import benchmark_programs as programs
from tools.benchmark_session import make_session, wrong_values
from tools.benchmark_timing import Contender, Sample


def rounds_of(*pairs, foreign=0.0):
    return [{"a": Sample(a, foreign), "b": Sample(b, foreign)} for a, b in pairs]


def test_rounds_alternate_their_order_and_warm_up():
    calls = []
    contenders = [
        Contender(name, lambda n, name=name: calls.append((name, n))) for name in "ab"
    ]
    rounds = benchmark_timing.interleave(contenders, calls=3, repeats=3, warmup=2)
    assert calls[:2] == [("a", 2), ("b", 2)]
    assert [name for name, _ in calls[2:]] == list("abbaab")
    assert {n for _, n in calls[2:]} == {3}
    assert [set(r) for r in rounds] == [{"a", "b"}] * 3


def test_two_rounds_are_made_whatever_the_deadline():
    contender = Contender("a", lambda n: None)
    made = benchmark_timing.interleave([contender], calls=1, repeats=9, deadline=0)
    assert len(made) == 2


def test_ratio_is_taken_within_rounds():
    # The second round ran on a machine ten times slower: the ratio stays two.
    ratio = benchmark_timing.paired_ratio(rounds_of((1, 2), (10, 20)), "a", "b")
    assert (ratio["median"], ratio["min"], ratio["max"]) == (2, 2, 2)
    assert (ratio["rounds"], ratio["quiet"]) == (2, True)


def test_busy_rounds_do_not_count_where_there_are_quiet_ones():
    rounds = rounds_of((1, 2)) + rounds_of((1, 9), (1, 9), foreign=0.5)
    ratio = benchmark_timing.paired_ratio(rounds, "a", "b")
    assert (ratio["median"], ratio["rounds"]) == (2, 1)
    assert benchmark_timing.is_noisy(rounds, "a")
    ratio = benchmark_timing.paired_ratio(rounds[1:], "a", "b")
    assert ratio["median"] == 9 and not ratio["quiet"]


def test_cpu_seconds_are_compared_in_every_round():
    rounds = [
        {"a": Sample(9, 0.9, cpu=1.0), "b": Sample(1, 0.9, cpu=1.5)},
        {"a": Sample(1, 0.9, cpu=2.0), "b": Sample(9, 0.9, cpu=3.0)},
    ]
    assert benchmark_timing.paired_ratio(rounds, "a", "b")["cpu"] == 1.5
    assert benchmark_timing.times(rounds, "a")["cpu_p50"] == 1500


def test_times_are_milliseconds():
    times = benchmark_timing.times(rounds_of((0.001, 1), (0.003, 1), (0.002, 1)), "a")
    assert (times["p50"], times["min"], times["max"]) == (2, 1, 3)


def test_own_work_is_not_foreign_load():
    earlier, later = benchmark_timing.Load(), benchmark_timing.Load()
    earlier.total, earlier.busy, earlier.own = 100.0, 40.0, 10.0
    later.total, later.busy, later.own = 104.0, 43.0, 12.0
    # Of four CPU seconds three were busy, two of them our own.
    assert earlier.foreign_until(later) == pytest.approx(0.25)
    assert later.foreign_until(later) == 1.0, "unknown load must not count as quiet"


def result_of(ms=10.0, ratio=None, noisy=False, wrong=False, kind="cpu"):
    row = {
        "suite": "step_plain",
        "variant": "plain",
        "dtype": "float32",
        "model": "resnet50",
        "size": 224,
        "bs": 8,
        "ms": {"p50": ms},
        "ratios": {} if ratio is None else {"published": {"median": ratio}},
        "noisy": noisy,
        "wrong": wrong,
    }
    return {"schema": 1, "device": {"kind": kind}, "rows": [row]}


@pytest.mark.parametrize(
    "old,new,verdict",
    [
        ({"ms": 10}, {"ms": 10.9}, "ok"),
        ({"ms": 10}, {"ms": 11.1}, "regression"),
        ({"ms": 10}, {"ms": 99, "noisy": True}, "noisy"),
        # Slower by the clock, as fast as before against the peer: another machine.
        ({"ms": 10, "ratio": 1.2}, {"ms": 20, "ratio": 1.2}, "ok"),
        ({"ms": 20, "ratio": 1.2}, {"ms": 10, "ratio": 1.0}, "regression"),
    ],
)
def test_comparison(tmp_path, old, new, verdict, capsys):
    paths = tmp_path / "old.json", tmp_path / "new.json"
    for path, given in zip(paths, (old, new), strict=True):
        path.write_text(json.dumps(result_of(**given)))
    code = benchmark_compare.main([str(path) for path in paths])
    assert code == (verdict == "regression")
    assert verdict in capsys.readouterr().out


def test_times_of_different_devices_are_not_compared():
    assert benchmark_compare.compare(result_of(), result_of(kind="gpu")) == []


def test_comparison_refuses_other_files(tmp_path, capsys):
    path = tmp_path / "results.json"
    path.write_text('{"metrics": 1}')
    assert benchmark_compare.main([str(path), str(path)]) == 2
    assert "is not a result of tools.benchmark" in capsys.readouterr().out


def test_a_wrong_loss_or_gradient_is_found():
    assert benchmark_suites.agrees("float32", (0.700, 250.0), (0.705, 251.0))
    for wrong in (0.60, float("nan"), float("inf")):
        assert not benchmark_suites.agrees("float32", (wrong, 1.0), (0.705, 1.0))
        assert not benchmark_suites.agrees("float32", (0.705, wrong), (0.705, 1.0))


def test_a_wrong_step_cannot_pass_however_fast(tmp_path):
    paths = tmp_path / "old.json", tmp_path / "new.json"
    paths[0].write_text(json.dumps(result_of(ms=10)))
    paths[1].write_text(json.dumps(result_of(ms=1, wrong=True)))
    assert benchmark_compare.main([str(path) for path in paths]) == 1


def test_threshold_splits_the_votes():
    rng = np.random.default_rng(0)
    positive = rng.uniform(0.4, 0.6, (5, 32))
    probs = np.stack([1 - positive, positive], axis=-1)
    own = np.take_along_axis(probs[:, 1:], probs[:, :1].argmax(-1)[..., None], axis=2)
    for share in (0.0, 0.05, 0.5):
        theta = benchmark_voting.threshold(probs, share)
        assert (own < theta).mean() == pytest.approx(share, abs=0.01)


def test_row_blocks_walk_through_the_whole_split():
    from cxai_jax import mesh as meshes

    blocks = programs.row_blocks(16, 4, 2, meshes.make_mesh(1))
    assert all(block.shape == (2, 4) for block in blocks)
    rows = np.concatenate([np.asarray(block).ravel() for block in blocks])
    assert (np.bincount(rows, minlength=16) == 2).all()


def test_unknown_voting_kind_names_the_known():
    with pytest.raises(ValueError, match="known: all, loop, early_unanimous"):
        benchmark_voting.tta_programs(("late",), images=1)


def test_unknown_suite_is_refused(capsys):
    with pytest.raises(SystemExit):
        benchmark.main(["stepp"])
    assert "unknown suite 'stepp'; known: step_plain" in capsys.readouterr().err


@pytest.mark.slow
def test_smoke_suite_writes_its_json(tmp_path):
    """Runs the whole step and both ways of voting; early exit must keep labels."""
    path = tmp_path / "smoke.json"
    given = ["smoke", "--json", str(path), "--budget_s", "900"]
    assert benchmark.main(given) == 0, "a loss differs from its reference"
    result = json.loads(path.read_text())
    assert result["skipped"] == []
    rows = {row["variant"]: row for row in result["rows"]}
    assert set(rows) == {"full, eval maps", "all", "early_undecided"}
    step = rows["full, eval maps"]
    assert step["donated_bytes"] >= step["state_bytes"] > 0
    assert step["ratios"]["naive"]["median"] > 0
    assert 17 <= rows["early_undecided"]["forwards_per_image"] <= 33
    again = benchmark_compare.compare(result, result)
    assert {row["slower"] for row in again} == {1.0}


@pytest.mark.slow
@pytest.mark.parametrize("model", benchmark_peer.NETWORKS)
def test_peer_computes_the_same_first_step(model):
    """Loss and gradient of the same images, boxes and weights, plain and in full.

    Of a DenseNet at 64 pixels the float32 gradient norm is 66.52 in PyTorch, 66.44 in
    its other layout, 66.45 in ours, and 66.51 in float64: norms over 16 values.
    """
    pytest.importorskip("torch")
    pytest.importorskip("timm")
    from tools import peer_torch

    size, batch = 96, 4  # Nine cells: with four CPE would rank none out.
    batches = programs.peer_batches(batch, size, model)
    variables = programs.initial_variables(model, size)
    draw = programs.first_draw(batch, size)
    kinds = {
        "plain": programs.PLAIN,
        "fair_eval": {**programs.FULL, **programs.EVAL_MAPS},
    }
    for kind, fields in kinds.items():
        fields = {**fields, "model.name": model}
        ours = programs.step_program(batch=batch, size=size, **fields)
        loss = ours.run(1)
        peer = peer_torch.make_step(
            kind, batches, model=model, variables=variables, draw=draw
        )
        assert peer.about["loss"] == pytest.approx(loss, rel=1e-3)
        norm = ours.about["gradient_norm"]
        assert peer.about["gradient_norm"] == pytest.approx(norm, rel=3e-3)
    peer = peer_torch.make_step(
        "published",
        batches,
        model=model,
        variables=variables,
        check="fair_eval",
        draw=draw,
    )
    assert peer.about["loss"] == pytest.approx(loss, rel=1e-3)
    assert np.isfinite(peer(2))


@pytest.mark.parametrize("kind", ["published", "batched"])
def test_peer_votes_from_the_same_probabilities(kind):
    pytest.importorskip("torch")
    pytest.importorskip("timm")
    from tools import peer_voting

    size, model = 32, "resnet18"
    images = benchmark_voting.voting_images(1, size, model)
    variables = programs.initial_variables(model, size)
    vote = peer_voting.make_voting(
        kind, images, model=model, variables=variables, k=2, theta=0.0
    )
    network = models.build(programs.make_config(**{"model.name": model}).model, 2)
    logits = jax.jit(lambda x: network.apply(variables, x, "eval")[0])(images[:1])
    expected = np.asarray(jax.nn.softmax(logits[0]))
    np.testing.assert_allclose(vote.about["probs"], expected, 1e-3)
    assert vote(1) == [expected.argmax()]  # Nothing falls below a threshold of 0.


def test_peer_of_another_model_is_refused(capsys):
    with pytest.raises(SystemExit):
        benchmark.main(["step_plain", "--peer=torch", "--model=lenet"])
    told = "--peer has no lenet; supported: efficientnet_lite0, resnet18, resnet50, "
    assert told + "densenet121" in capsys.readouterr().err


def test_forward_passes_are_compared(capsys):
    session = tiny_session()
    benchmark_parts.measure_infer(session, ("resnet18",))
    (row,) = session.rows
    assert row["suite"] == "infer" and row["model"] == row["variant"] == "resnet18"
    assert not row["wrong"]
    assert set(row["ratios"]) == {"naive"} | ({"torch"} if session.peer else set())


def test_convolutions_are_compared_and_listed_from_the_weakest(capsys):
    session = tiny_session()
    chosen = [c for c in benchmark_parts.CONVOLUTIONS if c.depthwise or c.k in (1, 7)]
    benchmark_parts.measure_conv(session, tuple(chosen[1:4]))
    assert len(session.rows) == 9
    assert not any(row["wrong"] for row in session.rows)
    table = capsys.readouterr().out.splitlines()[-10:]
    assert table[0].endswith("weakest")
    assert [line.split()[-1] for line in table[1:]] == [str(i) for i in range(1, 10)]
    against = "torch" if session.peer else "naive"
    ratios = {r["variant"]: r["ratios"][against]["median"] for r in session.rows}
    listed = [ratios[line[:48].strip()] for line in table[1:]]
    assert listed == sorted(ratios.values())


def tiny_session():
    """Two images of 32 pixels, against PyTorch where it is installed."""
    peer = benchmark_peer.installed()
    return make_session(size=32, batches=(2,), repeats=2, peer=peer)


def test_other_values_are_wrong():
    same, other = [1.0, 2.0], [1.0, 2.1]
    assert wrong_values("float32", same, {"torch": same}) == ""
    told = wrong_values("float32", same, {"naive": same, "torch": other})
    assert told == "torch's values differ by 0.048"
    assert wrong_values("float32", [float("nan")], {"torch": [1.0]})
    assert not benchmark_suites.wrong_step("float32", (0.7, 2.0), {"a": (0.7, 2.0)})
    told = benchmark_suites.wrong_step("float32", (0.7, 2.0), {"a": (0.6, 2.0)})
    assert told == "loss 0.7, gradient 2, but a 0.6, 2"


def test_committed_results_are_complete():
    """The committed measurement on a CPU has the rows that the README quotes."""
    path = Path(__file__).parents[2] / "experiments" / "results" / "benchmark_cpu.json"
    if not path.exists():
        pytest.skip(
            "no measurement yet: on a quiet machine, python -m tools.benchmark "
            f"step_plain step_full tta --peer=torch --json={path}"
        )
    result = benchmark_compare.read(path)
    rows = {(row["suite"], row["variant"]): row for row in result["rows"]}
    full = rows["step_full", "full, eval maps"]
    assert {"published", "fair_eval", "naive"} <= set(full["ratios"])
    assert {"published", "batched"} <= set(rows["tta", "all"]["ratios"])
    assert all(row["repeats"] >= 2 and not row["wrong"] for row in result["rows"])


HLO = """
  %t = f32[1024,1024]{1,0} transpose(%a), dimensions={1,0}
  %s = bf16[512,512]{1,0} copy(%b)
  %c = (bf16[8,7,7,64]{3,2,1,0}, u8[0]{0}) custom-call(%d), custom_call_target="__cudnn$convBiasActivationForward"
  %w = f32[3,3,64,64]{3,2,1,0} custom-call(%e), custom_call_target="__cudnn$convBackwardFilter"
  %p = f32[8,112,112,64]{3,2,1,0} select-and-scatter(%f, %g, %h), window={size=1x3x3x1}
  %r = f32[64]{0} all-reduce-start(%i), to_apply=%add
"""  # noqa: E501


def test_programs_are_examined():
    found = gpu_report.examine(HLO)
    assert found["large_copies"] == ["transpose f32[1024,1024]"]
    assert (found["convolutions"], found["fused_convolutions"]) == (2, 1)
    assert (found["select_and_scatter"], found["all_reduces"]) == (1, 1)
    assert found["all_gathers"] == 0


def test_targets_are_judged_in_their_direction():
    fast = gpu_report.Target("images/s", 10, 20)
    short = gpu_report.Target("seconds", 20, 10, at_most=True)
    values = (9, 10, 20, None)
    reached = ["missed", "must", "stretch", "not measured"]
    assert [fast.judge(value)["reached"] for value in values] == reached
    values = (21, 20, 10, None)
    assert [short.judge(value)["reached"] for value in values] == reached


@pytest.mark.slow
def test_the_gpu_report_runs_to_its_end_on_a_cpu(tmp_path):
    """Every section, so that the first minutes on a card find no misspelt name."""
    path = tmp_path / "report.json"
    with pytest.raises(SystemExit) as end:
        gpu_report.main(["--tiny", "--budget_s=1e9", f"--json={path}"])
    report = json.loads(path.read_text())
    assert report["errors"] == {} and end.value.code == 0
    sections = set(gpu_report.sections(make_session(), report))
    assert set(report["seconds"]) == sections
    measured = {t["target"] for t in report["targets"] if t["measured"] is not None}
    assert len(measured) >= 8 and set(report["hlo"]) == {"train", "voting_k1"}


def test_collectives_and_their_bytes_are_counted():
    hlo = """
  %a = (f32[64]{0}, f32[3,3]{1,0}) all-reduce-start(%x, %y), to_apply=%add
  %b = f32[] all-reduce(%z), to_apply=%add
  %c = bf16[8,4]{1,0} all-gather(%w), dimensions={0}
  %d = f32[8]{0} add(%b, %b)
"""
    assert growth.collectives(hlo) == {
        "all-reduce": {"number": 2, "bytes": 4 * (64 + 9 + 1), "largest": "f32[64]"},
        "all-gather": {"number": 1, "bytes": 64, "largest": "bf16[8,4]"},
    }


def test_the_step_of_a_pod_is_floor_and_sums():
    machine = roofline.Machine(bytes_per_s=1e12, flops_per_s=1e14)
    alone = growth.model(growth.Pod("one", 1, 32, machine, 1e11, 0.0))
    assert alone["efficiency"] == {"hidden": 1.0, "exposed": 1.0}
    pod = growth.Pod("four", 4, 32, machine, 1e11, 1e-5)
    found = growth.model(pod)
    assert found["gradients_ms"] == pytest.approx(1e3 * 1.5 * 4 * 23_512_130 / 1e11)
    waits = 106e-5 + 1.5 * 16 * 26_560 / 1e11
    assert found["statistics_ms"] == pytest.approx(1e3 * waits)
    step = found["step_ms"]
    assert step["one device"] == alone["step_ms"]["one device"]
    sums = found["gradients_ms"] + found["statistics_ms"]
    assert step["exposed"] == pytest.approx(step["one device"] + sums)
    assert step["hidden"] < step["exposed"]


def test_phases_end_at_the_lines_of_a_command():
    found = startup.phases(["json.tool", "--help"], {"usage": "asked", "opt": "told"})
    assert list(found["phases"]) == ["asked", "told"]
    total = sum(one["s"] for one in found["phases"].values())
    assert found["in all"]["s"] == pytest.approx(total) and total > 0
    with pytest.raises(RuntimeError, match="json.tool --help: usage"):
        startup.phases(["json.tool", "--help"], {"never said": "end"})


def test_the_share_of_the_network_is_its_time_over_the_whole():
    found = {"whole": {"images_per_s": 20.0}, "network": {"images_per_s": 80.0}}
    throughput.with_share(found, "network", ["whole"])
    assert found["whole"]["network_share"] == 0.25
    assert "network_share" not in found["network"]


def test_scoring_and_training_from_the_host_are_timed(tmp_path, capsys, monkeypatch):
    config = small("baseline", **{"data.image_size": 16, "data.resize": 18})
    monkeypatch.setattr(throughput_training, "load_config_file", lambda _: config)
    file = tmp_path / "found.json"
    few = ["--config=small", "--steps=1", "--threads", "0", "2", "--batch_size=4"]
    throughput_training.main([*few, f"--json={file}"])
    found = json.loads(file.read_text())
    assert set(found["scoring"]) == {"read", "network", "read and network", "metrics"}
    deliver = {"0 threads deliver", "2 threads deliver"}
    assert set(found["training"]) == {*deliver, "the step eats", "both together"}
    assert found["batch"] == 4 and found["training"]["both together"]["images"] == 4
    assert found["training"]["both together"]["network_share"] > 0
    assert "2 threads deliver" in capsys.readouterr().out


def test_what_cannot_be_timed_is_named_in_one_line(tmp_path):
    unprepared = ["--config=siteB", f"--data_dir={tmp_path}"]
    with pytest.raises(SystemExit, match="^error: .*site_b/official.* not prepared"):
        throughput_training.main(unprepared)
    with pytest.raises(SystemExit, match="^error: nothing does not exist"):
        throughput_training.main(["--config=nothing"])
    given = [f"--workdir={tmp_path}", f"--images={tmp_path}"]
    with pytest.raises(SystemExit, match="^error: .*config.json"):
        throughput.main(given)


def test_what_a_curve_costs_is_timed(tmp_path, capsys):
    file = tmp_path / "found.json"
    small = ["--images=2", "--size=16", "--model=tiny", "--rounds=2"]
    curve_cost.main([*small, f"--json={file}"])
    found = json.loads(file.read_text())
    assert set(found["rows"]) == {"curves", "network alone"}
    assert found["rows"]["curves"]["points"] == 2 * 16 + 1
    assert "ms a point" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="^error: .*'none'.*resnet18"):
        curve_cost.main(["--model=none"])
    with pytest.raises(SystemExit, match="^error: --images=8 --size=30: give"):
        curve_cost.main(["--size=30"])


def test_curves_that_differ_are_not_timed():
    mine = np.zeros((2, 3, 5))
    assert curve_cost.largest_difference(mine, mine[:, :, 1:]) == 0
    for wrong in (0.01, np.nan):
        with pytest.raises(ValueError, match="differ by .*: nothing was timed"):
            curve_cost.largest_difference(mine, mine[:, :, 1:] + wrong)


@pytest.mark.slow
def test_every_stage_of_predict_is_timed(tmp_path):
    _, records = make_run(tmp_path / "run")
    files = [tmp_path / f"{i}.png" for i in range(6)]
    for i, file in enumerate(files):
        Image.fromarray(records.images[i][..., 0]).save(file)
    found = throughput.stages(tmp_path / "run", files, [], tmp_path / "out")
    names = {"open PNG", "voting", "network", "row", "row and overlay", "page"}
    assert set(found) == names
    assert all(one["images_per_s"] > 0 for one in found.values())
    assert (tmp_path / "out" / "report.html").exists()


def test_exponent_of_a_power_law():
    values = [1, 2, 4, 8]
    found = scaling.exponents(values, [3 * v**1.5 for v in values])
    assert found == pytest.approx([1.5] * 3)


def test_floor_of_a_sweep_grows_with_its_work():
    session = make_session()
    session.machine = roofline.Machine(bytes_per_s=1e10, flops_per_s=1e11)
    rest = {"batch": 4, "size": 224}
    one, eight = (scaling.floor_ms("batch", b, rest, session) for b in (1, 8))
    assert one < eight < 8 * one  # The optimiser's pass does not depend on the batch.
    rest = {"images": 2, "size": 224}
    votes = [scaling.floor_ms("k", k, rest, session) for k in (8, 16)]
    assert votes[1] < 2 * votes[0]
    assert scaling.floor_ms("devices", 2, rest, session) is None
