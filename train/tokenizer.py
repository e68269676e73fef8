"""Train a tokenizer, the discrete VAE that gives DARL its tokens.

    python train/tokenizer.py --config train/configs/demo_tokenizer.yaml --out runs/tokenizer

It runs as train/pretrain.py does, with the same options, and leaves tokenizer.safetensors in the run's folder
for --darl.tokenizer. Batch, rate and decay are by default those of DALL-E (arXiv 2102.12092, appendix A.2).
"""

from train import pretrain
from train.engine.run import parse_config, run_script

DEFAULTS = {
    "model": "dvae_small",
    "epochs": 100,
    "batch_size": 512,
    "optim.blr": 5e-5,  # 1e-4 at this batch size
    "optim.warmup_epochs": 0,
    "optim.weight_decay": 1e-4,
    "optim.betas": (0.9, 0.999),
}


def parse(arguments: list[str] | None = None) -> pretrain.Config:
    """The configuration from the command line and YAML files.

    Raises:
        ValueError: the model is no tokenizer.
    """
    config = parse_config(pretrain.Config, "train/tokenizer.py", __doc__, arguments, **DEFAULTS)
    if not config.model.startswith("dvae_"):
        raise ValueError(f"model: expected dvae_tiny, dvae_small or dvae_base, got {config.model}")
    return config


def main(arguments: list[str] | None = None) -> None:
    """Train."""
    run_script("tokenizer", parse, pretrain.prepare, arguments)


if __name__ == "__main__":
    main()
