"""What tests of whole runs share: a tiny run, and the environment of processes that are started."""

import os

TINY = [
    "--model=mae_vit_tiny",
    "--model_args={patch_size: 8, embed_dim: 32, depth: 2, num_heads: 2, decoder_embed_dim: 16,"
    " decoder_depth: 1, decoder_num_heads: 2}",
    "--img_size=32",
    "--batch_size=8",
    "--steps=24",
    "--optim.warmup_steps=2",
    "--optim.blr=0.03",
    "--eval_every=8",
    "--checkpoint_every=4",
    "--device=cpu",
]
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1"}
