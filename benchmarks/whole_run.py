"""A whole run as a user starts it, beside Hugging Face's Trainer driving this project's plain model.

Both are processes of their own: `finpatch train` verifies, trains, judges and writes everything that it writes; the peer
loads the same dataset, trains the same model along its plain path over the same batches in the same order, with fused
AdamW, the same clipping and warm-up, validates after every epoch and keeps the best weights. In bf16 the peer is the faster of
its two precisions.
"""

import statistics
import sys
import tempfile
from pathlib import Path

from .children import command, make_data, seconds
from .turns import median_ratio, not_measured, row

CONFIG = """
seed: 0
dataset: [SP500.dataset.a20]
task: direction
horizon: 1
context_length: 60
splits: {{train_end: 2011-12-31, val_end: 2015-12-31, test_end: 2018-12-31}}
model: {{patch_length: 10, stride: 5, dropout: 0.1, head_dropout: 0.1}}
optim: {{lr: 1e-4, weight_decay: 0.05, warmup_steps: 40, global_batch_size: 64, epochs: {epochs}, patience: null}}
"""


def train_peer(config_path: str, budget: str, data_dir: str, out: str, precision: str) -> None:
    "Train with the peer in this process."
    import torch
    import transformers

    from finpatch.dataset import load_dataset
    from finpatch.experiment import load_experiment_config
    from finpatch.job import make_model
    from finpatch.trainer import epoch_order

    config = load_experiment_config(config_path)
    data, optim = load_dataset(config, data_dir), config.optim
    model = make_model(config, budget, data, is_fused=False)

    class Windows(torch.utils.data.Dataset):
        def __init__(self, split):
            self.index = data.index[split]

        def __len__(self):
            return len(self.index)

        def __getitem__(self, i):
            end = int(data.row[self.index[i]]) + 1
            return {"x": data.x[end - config.context_length : end], "labels": data.y[self.index[i]]}

    class Wrapped(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.model = model

        def forward(self, x, labels):
            logits = self.model(x)
            return {"loss": data.task.loss(logits, labels).mean(), "logits": logits}

    class Order(torch.utils.data.Sampler):
        epoch = 0

        def __len__(self):
            return len(data.index["train"])

        def __iter__(self):
            yield from epoch_order(len(self), config.seed, self.epoch).tolist()
            Order.epoch += 1

    class Peer(transformers.Trainer):
        def _get_train_sampler(self, *_):
            return Order()

    options = {"per_device_train_batch_size": optim.global_batch_size, "per_device_eval_batch_size": 256}
    options |= {"num_train_epochs": optim.epochs, "learning_rate": optim.lr, "weight_decay": optim.weight_decay}
    options |= {"warmup_steps": optim.warmup_steps, "max_grad_norm": 1.0, "adam_beta2": optim.beta2, "lr_scheduler_type": "cosine"}
    options |= {"optim": "adamw_torch_fused", "eval_strategy": "epoch", "save_strategy": "epoch", "save_total_limit": 1}
    options |= {"load_best_model_at_end": True, "report_to": "none", "use_cpu": True, "disable_tqdm": True}
    options["bf16"] = precision == "bf16"
    arguments = transformers.TrainingArguments(out, remove_unused_columns=False, label_names=["labels"], **options)
    peer = Peer(Wrapped(), arguments, train_dataset=Windows("train"), eval_dataset=Windows("val"))
    peer.train()
    peer.predict(Windows("test"))


def rows(n_turns: int = 3, budget: str = "2m", epochs: int = 10) -> list[dict]:
    work, target = f"whole `finpatch train` of {budget}, {epochs} epochs, {{}}, against Hugging Face's Trainer", "≥ 1.8 ×"
    try:
        import accelerate  # noqa: F401  # Hugging Face's Trainer needs it
        import transformers  # noqa: F401
    except ImportError as error:
        return [not_measured(work.format("float32"), target, error)]
    took = {f"{who} {precision}": [] for precision in ("fp32", "bf16") for who in ("finpatch", "Hugging Face")}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_data(folder / "data")
        (folder / "run.yaml").write_text(CONFIG.format(epochs=epochs))
        config, data = str(folder / "run.yaml"), str(folder / "data")
        where = ["--data-dir", data, "--device", "cpu", "--runs-dir", str(folder / "runs")]
        for turn in range(n_turns):
            for precision in ("fp32", "bf16"):
                own = command("train", "--config", config, "--budget", budget, "--precision", precision, *where)
                took[f"finpatch {precision}"].append(seconds(*own))
                peer = ("-m", "benchmarks.whole_run", config, budget, data, str(folder / f"{precision}{turn}"), precision)
                took[f"Hugging Face {precision}"].append(seconds(*peer))
    middle = {who: statistics.median(values) for who, values in took.items()}
    detail, told = ", ".join(f"{who} {value:.1f} s" for who, value in middle.items()), []
    best = min(("Hugging Face fp32", "Hugging Face bf16"), key=middle.get)
    for precision, name, peer in (("fp32", "float32", "Hugging Face fp32"), ("bf16", "bfloat16", best)):
        ratio = median_ratio(took[peer], took[f"finpatch {precision}"])
        told.append(row(work.format(name), target, f"{ratio:.2f} ×", detail))
    return told


if __name__ == "__main__":
    train_peer(*sys.argv[1:])
