"""G3. Risk: a name that promises another size than the model has. Counts are taken on the model itself."""

import subprocess
import sys
from dataclasses import fields
from importlib.resources import files
from itertools import pairwise, product

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from finpatch.budget import (
    check_budget,
    closed_form,
    count_parameters,
    count_parameters_by_part,
    describe_budgets,
    flops_per_sample,
    load_patchtst_config,
    solve_budget,
)
from finpatch.model_config import PatchTSTConfig
from finpatch.patchtst import PatchTST

PRESETS = {"2m": 1_822_657, "20m": 19_029_505, "200m": 201_769_985}
SIZES = np.geomspace(1_000, 2_000_000_000, 200).round().astype(int).tolist()


def build(config, device="meta"):
    with torch.device(device):
        return PatchTST(config)


@pytest.mark.parametrize("name", PRESETS)
def test_presets_have_exactly_the_parameters_of_the_design(name):
    model = build(load_patchtst_config(name), "meta" if name == "200m" else "cpu")
    assert count_parameters(model) == PRESETS[name]
    assert sum(count_parameters_by_part(model).values()) == PRESETS[name]
    assert closed_form(model.config) == count_parameters_by_part(model)
    check_budget(name.upper(), PRESETS[name])


def test_every_shipped_model_file_is_a_preset():
    shipped = sorted(file.name for file in (files("finpatch") / "configs" / "model").iterdir())
    assert shipped == sorted(f"patchtst_{name}.yaml" for name in PRESETS)


def test_a_frozen_parameter_is_not_counted():
    model = build(load_patchtst_config("2m"))
    model.head.requires_grad_(False)
    assert count_parameters(model) == PRESETS["2m"] - (11 * 192 + 1) == sum(count_parameters_by_part(model).values())


def grid():
    "All combinations of the options that can change a count, over two input shapes."
    heads = ({"n_outputs": 1}, {"n_outputs": 3}, {"horizon": 4})
    revins = ({}, {"revin": True}, {"revin": True, "revin_affine": True})
    shapes = (
        {"n_features": 3, "context_length": 13, "patch_length": 4, "stride": 2, "d_ff": 24},
        {"n_features": 5, "context_length": 10, "patch_length": 10, "stride": 3, "d_ff": 70, "n_layers": 3},
    )
    switches = product(
        ("mixed", "independent"), (False, True), ("layernorm", "batchnorm"), (False, True), ("learned", "sincos")
    )
    for shape, head, revin, (mode, padding, norm, last, positions) in product(shapes, heads, revins, switches):
        options = {
            "channel_mode": mode,
            "end_padding": padding,
            "norm": norm,
            "final_norm": last,
            "positions": positions,
        }
        yield PatchTSTConfig(**({"d_model": 16, "n_heads": 4, "n_layers": 1} | shape | head | revin | options))


def test_the_closed_form_is_the_count_over_all_options():
    configs = list(grid())
    assert len(set(configs)) == 576
    for config in configs:
        assert closed_form(config) == count_parameters_by_part(build(config)), config


def test_two_hundred_sizes_are_met_by_the_rule():
    solved = [solve_budget(size) for size in SIZES]
    for size, c in zip(SIZES, solved, strict=True):
        assert abs(sum(closed_form(c).values()) / size - 1) <= 0.02
        assert c.d_model % c.n_heads == 0
        assert c.d_model % 8 == 0 or size < 2_200
        if size > 20_000:
            assert 2 <= c.d_ff / c.d_model <= 7 and 8 <= c.d_model / c.n_layers <= 128, (size, c)
    assert all(small.n_layers <= large.n_layers for small, large in pairwise(solved))
    assert solved[0].n_layers == 1 and solved[-1].n_layers == 32


@pytest.mark.parametrize("size", [*SIZES[::12], SIZES[-1]])
def test_solved_models_are_counted_within_their_tolerance(size):
    check_budget(size, count_parameters(build(solve_budget(size))))


@pytest.mark.parametrize("shape", [(1, 30), (6, 60), (6, 512), (100, 60), (20, 250)])
def test_other_inputs_are_solved_too(shape):
    for size in np.geomspace(50_000, 500_000_000, 25).astype(int).tolist():
        for options in ({}, {"channel_mode": "independent", "revin": True, "revin_affine": True}):
            try:
                config = solve_budget(size, *shape, **options)
            except ValueError as error:
                assert "must leave room for an encoder" in str(error) and size < 2_000_000
                continue
            check_budget(size, sum(closed_form(config).values()))
            assert (config.n_features, config.context_length) == shape


def test_the_operations_of_a_training_step_are_three_forward_passes_less_the_input_gradient():
    config = PatchTSTConfig(n_features=20, context_length=60, d_model=32, n_heads=2, n_layers=2, d_ff=64, dropout=0.0)
    model = PatchTST(config, fused=False)
    with FlopCounterMode(display=False) as counter:
        model(torch.randn(3, 60, 20)).sum().backward()
    patch_map = 2 * 3 * 11 * 200 * 32
    assert counter.get_total_flops() == 3 * flops_per_sample(config, training=True) - patch_map


def test_budgets_are_described_without_torch():
    code = (
        "import sys, finpatch.budget as b; b.describe_budgets(['2m', '200m', '30k']); assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_the_description_holds_the_promised_keys():
    rows = describe_budgets(["2m", "20m", "200m"])["budgets"]
    promised = {
        "n_params",
        "n_params_by_part",
        "d_model",
        "n_heads",
        "n_layers",
        "d_ff",
        "flops_per_sample",
        "train_bytes",
    }
    assert all(promised <= set(row) for row in rows.values())
    assert {name: row["n_params"] for name, row in rows.items()} == PRESETS
    assert rows["200m"]["train_bytes"] > 16 * PRESETS["200m"]


@pytest.mark.parametrize("text", ["d_model: [", "- 1", "", "d_model: 1e2x"])
def test_a_broken_model_file_is_named(tmp_path, text):
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    with pytest.raises(ValueError, match=r"mine\.yaml|d_model"):
        load_patchtst_config(path)


def test_a_model_file_may_set_every_field(tmp_path):
    path = tmp_path / "mine.yml"
    values = {field.name: getattr(load_patchtst_config("2m"), field.name) for field in fields(PatchTSTConfig)}
    path.write_text("\n".join(f"{key}: {'null' if value is None else value}" for key, value in values.items()))
    assert load_patchtst_config(path) == load_patchtst_config("2m")
    check_budget(path, 12_345)
    with pytest.raises(ValueError, match=r"`context_length` of .* must equal the data's; got 60 against 90"):
        load_patchtst_config(path, context_length=90)
