"""What a run tells the experiment trackers besides its scalars, which the Trainer's `--report_to` sends by itself.

    unitok-hf train configs/unitok.json --report_to tensorboard     then: tensorboard --logdir out/base_checkpoints/d4/runs
    unitok-hf train configs/unitok.json --report_to trackio         then: trackio show

- every picture grid of an evaluation goes to TensorBoard and trackio, too, as `eval/samples`
- the last evaluation takes place before training ends: at its end the trackers close their run, and what is logged later
  would open another
"""

import numpy as np
from PIL import Image
from transformers import Trainer, TrainerCallback
from transformers.integrations import TensorBoardCallback, TrackioCallback


class LastEvaluationCallback(TrainerCallback):
    """Has the last step followed by an evaluation. With `--eval_strategy epoch` that is so already."""

    def on_step_end(self, args, state, control, **_):
        if state.global_step >= state.max_steps and args.eval_strategy != "epoch":
            control.should_evaluate = True


def track_pictures(trainer: Trainer, pictures: Image.Image) -> None:
    """Send a picture grid of the evaluation at hand, whose metrics are logged, to the trackers that show pictures."""
    step = trainer.state.global_step
    for callback in trainer.callback_handler.callbacks:
        if isinstance(callback, TensorBoardCallback):
            callback.tb_writer.add_image("eval/samples", np.asarray(pictures), step, dataformats="HWC")
            callback.tb_writer.flush()
        elif isinstance(callback, TrackioCallback):
            import trackio  # there, since the callback is

            trackio.log({"eval/samples": trackio.Image(pictures, caption=f"step {step}"), "train/global_step": step})


def last_metrics(trainer: Trainer) -> dict[str, float]:
    """Metrics of the weights that training ended with: those of their evaluation in the log, or of one made now.

    An evaluation after training would open another run of the trackers, which have closed theirs.
    """
    best = trainer.state.best_global_step if trainer.args.load_best_model_at_end else None
    step = trainer.state.global_step if best is None else best
    logs = [log for log in trainer.state.log_history if log["step"] == step]
    found = [log for log in logs if any(name.startswith("eval_") for name in log)]
    if not found:
        return trainer.evaluate()
    return {name: value for name, value in found[-1].items() if name != "step"}
