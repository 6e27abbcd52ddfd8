"""A Space with the page of a model. Put your model's name here, or into the Space's variable UNITOK_MODEL.

UNITOK_MODEL=out/demo/model python space/app.py    # the same page on your own machine
"""

import os

from unitok_hf.training.app import build_page, launch
from unitok_hf.training.generate import load_model, pick_device


MODEL = os.environ.get("UNITOK_MODEL", "me/my-model")

demo = build_page(*load_model(MODEL, pick_device("auto")))

if __name__ == "__main__":
    launch(demo)
