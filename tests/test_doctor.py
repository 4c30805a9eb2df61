"""G8. Risk: a device that computes something else is trusted, because the probes do not see the fault."""

import math
from functools import partial

import pytest
import torch
from torch.nn import functional as F

from finpatch import fast, parity
from finpatch.core import HardwareError, read_json, to_json
from finpatch.doctor import certified, certify, certify_once, check_certificate, probe_dtype, probe_isolation, trust
from finpatch.experiment import load_experiment_config
from finpatch.parity import CASES, FORECAST, deviation, make_case, probe_parity
from finpatch.patchtst import Attention, PatchTST, attend
from finpatch.run import load_run, override, prepare, train_run
from finpatch.trainer import Callback

CPU = torch.device("cpu")
FEW = (CASES[1], CASES[10], FORECAST)  # 1 or 3 windows, head sizes 16, 32 and 64, 4 and 8 patches


def merge(h, mixed):  # (B, H, N, D/H) -> (R, D)
    return mixed.transpose(1, 2).reshape(h.shape)


class WrongScale(Attention):
    def forward(self, h):
        q, k, v = self.heads(h)
        return self.out(merge(h, attend(q * 1.002, k, v, self.dropout if self.training else 0.0, self.fused)))


class WrongForFew(Attention):
    "Right for more than eight patches or small heads, as a kernel of MPS once was."

    def forward(self, h):
        q, k, v = self.heads(h)
        is_hit = q.shape[2] <= 8 and q.shape[3] >= 64
        return self.out(merge(h, attend(q, k, v.flip(2) if is_hit else v, self.dropout if self.training else 0.0)))


class AlwaysDropped(Attention):
    def forward(self, h):
        return self.out(merge(h, attend(*self.heads(h), self.dropout, self.fused)))


class NeverDropped(Attention):
    def forward(self, h):
        return self.out(merge(h, attend(*self.heads(h), 0.0, self.fused)))


class LeakingMask(Attention):
    "One long sequence whose mask should keep samples apart, and lets a share of e⁻¹⁴ through."

    def forward(self, h):
        q, k, v = (t.transpose(0, 1).flatten(1, 2)[None] for t in self.heads(h))  # (1, H, R, D/H)
        sample = torch.arange(len(h)) // self.n_patches
        mask = torch.where(sample[:, None] == sample, 0.0, self.leak)
        dropout = self.dropout if self.training else 0.0
        return self.out(F.scaled_dot_product_attention(q, k, v, mask, dropout)[0].transpose(0, 1).reshape(h.shape))

    leak = -14.0


class SoundMask(LeakingMask):
    leak = -math.inf


def with_attention(kind, is_broken=lambda fused: True):
    "A factory whose models use another attention, for some choices of `fused`."

    def factory(config, fused):
        model = PatchTST(config, fused)
        for block in model.encoder:
            block.attention.__class__ = kind if is_broken(fused) else Attention
        return model

    return factory


class Batch(PatchTST):
    "A model that mixes a little of each sample into the next."

    def forward(self, x):
        y = super().forward(x)
        return y + 1e-6 * y.roll(1, 0)


class BatchInTraining(Batch):
    def forward(self, x):
        return super().forward(x) if self.training else PatchTST.forward(self, x)


class Channels(PatchTST):
    def forward(self, x):
        y = super().forward(x)
        return y + 1e-6 * y.roll(1, -1) if self.config.horizon else y


class Unread(PatchTST):
    "Reads the rows that no patch holds, each channel its own."

    def forward(self, x):
        first = x[:, :1] if self.config.horizon else x[:, 0].mean(-1, keepdim=True)
        return super().forward(x) + 1e-6 * first


class CrossedGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, y):
        return y.clone()

    @staticmethod
    def backward(ctx, grad):
        return grad + 1e-6 * grad.roll(1, 0)


class Crossed(PatchTST):
    def forward(self, x):
        return CrossedGradient.apply(super().forward(x))


class WrongGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, y):
        return y.clone()

    @staticmethod
    def backward(ctx, grad):
        return grad * 1.001


class WrongBackward(PatchTST):
    def forward(self, x):
        return WrongGradient.apply(super().forward(x))


class WrongInTraining(PatchTST):
    def forward(self, x):
        return super().forward(x) * (1.001 if self.training else 1.0)


class WrongInEval(PatchTST):
    def forward(self, x):
        return super().forward(x) * (1.0 if self.training else 1.001)


class Frozen(PatchTST):
    "BatchNorm whose statistics stay as they were."

    def __init__(self, config, fused=True):
        super().__init__(config, fused)
        for module in self.modules():
            if isinstance(module, torch.nn.BatchNorm1d):
                module.momentum = 0.0


class Deaf(PatchTST):
    "Answers to nothing, though its gradient says otherwise."

    def forward(self, x):
        y = super().forward(x)
        return y - y.detach() + 0.5


class NotANumber(PatchTST):
    def forward(self, x):
        return super().forward(x) * torch.nan


class NoDropout(PatchTST):
    "Drops in attention, not in the embedding."

    def embed(self, x):
        is_training, self.training = self.training, False
        h, self.training = super().embed(x), is_training
        return h


class Unsupported(PatchTST):
    def forward(self, x):
        raise NotImplementedError("The operator 'aten::bmm' is not implemented for this device.\nMore lines")


def make_of(factory):
    return partial(factory, fused=True)


SIGHT = {  # what must see which fault
    "a wrong scale": (with_attention(WrongScale), "parity"),
    "dropout left on": (with_attention(AlwaysDropped), "dropout"),
    "a leaking mask": (with_attention(LeakingMask), "isolation"),
    "mixed samples": (Batch, "isolation"),
    "mixed samples in training": (BatchInTraining, "isolation"),
    "mixed channels": (Channels, "isolation"),
    "rows before the window": (Unread, "isolation"),
    "crossed gradients": (Crossed, "isolation"),
    "a deaf model": (Deaf, "isolation"),
    "a wrong gradient": (WrongBackward, "parity"),
    "wrong in train mode": (WrongInTraining, "parity"),
    "wrong in eval mode": (WrongInEval, "parity"),
    "not a number": (NotANumber, "parity"),
    "no dropout in the embedding": (NoDropout, "dropout"),
    "no dropout in attention": (with_attention(NeverDropped), "dropout"),
}
ALONE = set(SIGHT) - {"a wrong scale", "a deaf model", "wrong in train mode", "wrong in eval mode", "not a number"}


@pytest.mark.parametrize("fault", SIGHT)
def test_each_fault_is_seen_by_the_probe_that_is_there_for_it_and_refused(fault):
    factory, probe = SIGHT[fault]
    certificate = certify(CPU, factory, cases=FEW)
    assert (
        not certificate[probe]["is_ok"]
        and not certificate["is_ok"]
        and set(certificate["faults"]) == {"fused", "plain"}
    )
    if fault in ALONE:  # too small for parity, or of no matter to it: one probe's word must be enough
        assert [k for k in ("parity", "isolation", "dropout") if not certificate[k]["is_ok"]] == [probe]
    with pytest.raises(
        HardwareError, match="cpu must compute what the CPU computes; got .*, also without fused attention"
    ):
        check_certificate(certificate)


def test_a_sound_mask_is_not_refused():
    certificate = certify(CPU, with_attention(SoundMask), cases=FEW)
    assert certificate["is_ok"] and certificate["is_fused"]


def test_a_kernel_that_is_wrong_for_short_queries_and_large_heads_is_found_by_the_shipped_cases():
    report = probe_parity(CPU, make_of(with_attention(WrongForFew)), CASES)
    assert not report["is_ok"]
    innocent = [c for c in CASES if c.config.n_patches > 8 or c.config.d_model // c.config.n_heads < 64]
    assert probe_parity(CPU, make_of(with_attention(WrongForFew)), tuple(innocent))["is_ok"]


def test_frozen_batch_statistics_are_found():
    batchnorm = make_case(3, norm="batchnorm")
    assert not probe_parity(CPU, make_of(Frozen), (batchnorm,))["is_ok"]
    assert probe_parity(CPU, make_of(Frozen), FEW)["is_ok"]


def test_an_optimiser_that_steps_otherwise_is_found(monkeypatch):
    class Decays(parity.AdamW):
        n = 0

        def __init__(self, params, **options):
            Decays.n += 1  # the reference comes first, the candidate second
            super().__init__(params, **options, weight_decay=0.01 if Decays.n % 2 else 1.0)

    monkeypatch.setattr(parity, "AdamW", Decays)
    report = probe_parity(CPU, make_of(PatchTST), FEW)
    assert not report["is_ok"] and "after 3 steps" in report["where"] and report["gradients"] < 1e-4


@pytest.mark.parametrize("kind", [WrongScale, AlwaysDropped, LeakingMask])
def test_a_broken_fused_kernel_falls_back_to_the_plain_path(kind, tmp_path):
    certificate = trust(CPU, tmp_path / "device.json", factory=with_attention(kind, lambda fused: fused), cases=FEW)
    assert certificate["is_ok"] and not certificate["is_fused"]
    assert set(certificate["faults"]) == {"fused"} and certificate["parity"]["is_ok"]


def test_a_refusal_leaves_a_certificate_and_says_why(tmp_path):
    path = tmp_path / "device.json"
    with pytest.raises(
        HardwareError, match=r"got parity: NotImplementedError: The operator 'aten::bmm' .*\. Install torch"
    ):
        trust(CPU, path, factory=Unsupported, cases=FEW)
    found = read_json(path)
    assert not found["is_ok"] and "More lines" not in to_json(found)
    assert [found[k]["is_ok"] for k in ("parity", "isolation", "dropout")] == [False] * 3
    assert not found["dtypes"]["float32"]["is_ok"]


def test_an_own_error_is_not_taken_for_a_fault_of_the_device():
    def factory(config, fused):
        raise KeyError("a bug")

    with pytest.raises(KeyError):
        certify(CPU, factory, cases=FEW)


def test_a_device_is_certified_with_everything_that_the_command_shows(device, tmp_path):
    reading = {"source": "psutil", "level": "fair", "temp_c": 71.5}
    certificate = trust(device, tmp_path / "device.json", thermal=reading)
    assert read_json(tmp_path / "device.json") == certificate
    assert certificate["schema_version"] == 1 and certificate["device"] == str(device)
    assert certificate["torch"] == torch.__version__ and certificate["timestamp"].endswith("Z")
    assert certificate["parity"]["n_cases"] == len(CASES) and 0 < certificate["parity"]["worst"] <= 1e-4
    assert certificate["memory"]["total_gib"] > 0 and certificate["thermal"] == reading
    assert certificate["dtypes"]["float32"]["is_ok"]
    assert certificate["dtypes"]["float64"]["is_ok"] == (device.type != "mps")
    if device.type == "cpu":
        assert certificate["determinism"]["is_bitwise"] and certificate["is_fused"]
        assert certificate["isolation"]["worst"] == 0


def test_the_probes_leave_random_state_and_gradient_mode_alone():
    torch.manual_seed(7)
    before = torch.get_rng_state()
    certify(CPU, cases=FEW)
    assert torch.equal(torch.get_rng_state(), before) and torch.is_grad_enabled()


def test_two_threads_keep_samples_apart_to_the_last_bit():
    n = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        assert probe_isolation(CPU, make_of(PatchTST))["worst"] == 0
    finally:
        torch.set_num_threads(n)


def test_noise_is_recorded_and_hides_no_larger_leak():
    source = torch.Generator().manual_seed(0)  # goes its own way, as the order of a device's sums does

    class Noisy(PatchTST):
        def forward(self, x):
            y = super().forward(x)
            return y + torch.randn(y.shape, generator=source, dtype=y.dtype) * 1e-7

    class NoisyLeak(Noisy):
        def forward(self, x):
            y = super().forward(x)
            return y + 1e-4 * y.roll(1, 0).detach()  # no gradient shows it

    quiet, leaking = certify(CPU, Noisy, cases=FEW), certify(CPU, NoisyLeak, cases=FEW)
    assert not quiet["determinism"]["is_bitwise"] and quiet["is_ok"]
    assert not leaking["isolation"]["is_ok"]


def test_a_dtype_that_works_badly_or_not_at_all_is_recorded_without_a_refusal():
    class Coarse(PatchTST):
        def forward(self, x):
            if x.dtype == torch.float64:
                raise TypeError("Cannot convert a MPS Tensor to float64 dtype")
            return super().forward(x) * (2 if x.dtype == torch.bfloat16 else 1)

    certificate = certify(CPU, Coarse, cases=FEW)
    assert certificate["is_ok"]
    assert {k: v["is_ok"] for k, v in certificate["dtypes"].items()} == {
        "float32": True,
        "bfloat16": False,
        "float64": False,
    }
    assert "float64" in certificate["dtypes"]["float64"]["why"]


def test_deviation_is_relative_and_takes_nan_for_the_worst():
    want = {"big": torch.tensor([10.0, -20.0]), "tiny": torch.tensor([1e-9])}
    error, name = deviation({"big": torch.tensor([10.0, -19.0]), "tiny": torch.tensor([1e-9])}, want)
    assert error == pytest.approx(0.05) and name == "big"
    assert deviation({"big": want["big"], "tiny": torch.tensor([1e-3])}, want)[0] == pytest.approx(0.05)
    assert deviation({"big": torch.tensor([torch.nan, 0]), "tiny": torch.tensor([9.0])}, want) == (math.inf, "big")


def test_a_good_certificate_passes_and_a_gpu_gets_its_own_remedy():
    check_certificate({"is_ok": True})
    bad = {"is_ok": False, "device": "mps", "faults": {"plain": "parity: outputs"}}
    with pytest.raises(HardwareError, match=r"mps must compute .* Use `--device cpu`"):
        check_certificate(bad)


# ---- what a run makes of it


@pytest.fixture
def fresh():
    "No certificate from before this test, and none left behind."
    certify_once.cache_clear()
    yield
    certify_once.cache_clear()


class Count(Callback):
    "How often fused attention had been called when training began."

    def __init__(self, calls):
        self.calls = calls

    def before_fit(self, trainer):
        self.before = len(self.calls)


QUICK_RUN = override(load_experiment_config("sp500_direction"), max_steps=2, is_cooled=False)


def test_a_run_on_a_device_with_broken_fused_attention_uses_math_and_records_it(fresh, data_dir, tmp_path, monkeypatch):
    calls, honest = [], fast.attention

    def broken(q, k, v, dropout):
        calls.append(q.shape)
        return honest(q, k, v.flip(2), dropout)

    monkeypatch.setattr("finpatch.patchtst.attention", broken)
    count, options = Count(calls), {"data_dir": data_dir, "is_progress_shown": False, "device": "cpu"}
    path = train_run(QUICK_RUN, "5k", run_dir=tmp_path / "run", callbacks=(count,), **options)
    assert 0 < count.before == len(calls)  # the doctor tried it; neither training nor prediction did
    record = read_json(path / "run.json")
    assert record["certificate"]["is_ok"] and not record["certificate"]["is_fused"]
    assert record["certificate"]["faults"]["fused"].startswith("parity: ")
    assert record["effective"]["is_fused"] is False
    run = load_run(path, None)
    assert not any(block.attention.fused for block in run.model.encoder) and len(calls) == count.before
    monkeypatch.undo()
    certify_once.cache_clear()
    sound = train_run(QUICK_RUN, "5k", run_dir=tmp_path / "sound", **options)
    assert read_json(sound / "run.json")["effective"]["is_fused"] is True
    assert all(block.attention.fused for block in load_run(sound, None).model.encoder)


def test_a_device_that_fails_with_math_attention_too_trains_nothing(fresh, data_dir, tmp_path, monkeypatch):
    def mixed(q, k, v, *args):
        y = attend(q, k, v, *args)
        return y + 1e-3 * y.roll(1, 0)

    monkeypatch.setattr("finpatch.patchtst.attend", mixed)
    with pytest.raises(HardwareError, match="cpu must compute what the CPU computes; got isolation: .* without fused"):
        train_run(QUICK_RUN, "5k", data_dir=data_dir, runs_dir=tmp_path / "runs", device="cpu")
    assert not (tmp_path / "runs").exists()


def test_a_process_asks_the_doctor_once_for_each_number_of_threads(fresh, monkeypatch):
    asked = []
    monkeypatch.setattr("finpatch.doctor.certify", lambda device, cases: asked.append(cases) or {"is_ok": True})
    n = torch.get_num_threads()
    try:
        for threads in (n, n, n + 1):
            torch.set_num_threads(threads)
            certified(CPU, CASES[0].config)
    finally:
        torch.set_num_threads(n)
    assert [len(cases) for cases in asked] == [3, 3]
    certified(torch.device("mps"), CASES[0].config)  # more shapes, and the model's own
    assert len(asked[-1]) == len(CASES) + 1 and asked[-1][-1].config.n_layers == 1


def test_a_device_that_fails_bfloat16_trains_in_float32_unless_it_was_asked_for(fresh, data_dir, monkeypatch):
    lie = lambda device, make, name: probe_dtype(device, make, name) | {"is_ok": name != "bfloat16"}
    monkeypatch.setattr("finpatch.doctor.probe_dtype", lie)
    job = prepare(override(QUICK_RUN, precision="auto"), "5k", data_dir, "cpu", None)
    assert job.record["effective"]["precision"] == "fp32"
    with pytest.raises(HardwareError, match="fails the doctor's probe"):
        prepare(override(QUICK_RUN, precision="bf16"), "5k", data_dir, "cpu", None)
