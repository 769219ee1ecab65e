"""RL finetuning of language models under KL regularisation: `kl_reg.train(config, reward_fn=...)`."""
import os
from collections.abc import Callable, Sequence

from ml_collections import ConfigDict

from kl_reg.analysis.report.page import write_report
from kl_reg.sharding import multihost
from kl_reg.training import loop
from kl_reg.training.loop import Result

__all__ = ["Result", "train"]


def train(config: ConfigDict, reward_fn: Callable | Sequence[Callable] | None = None,
          workdir: str | os.PathLike = "runs/latest", loss_fn: Callable | None = None,
          began: float | None = None, start: str | None = None) -> Result:
    """Trains all members of `config.sweep` (one, if it is empty), evaluates them and the base, and writes the report.

    Resumes from the last checkpoint in `workdir`; a finished run is evaluated and reported again.

    Args:
        config: from `kl_reg.config.default()`.
        reward_fn: instead of `config.reward`: fn(prompts, completions, completion_ids, **columns) ->
            list[float | None], sync or async, called with what the environment has scored; or several, to be added up.
        workdir: for config.json, members/<k>/, checkpoints/, summary.json, figures/ and report.html: a local path, or
            an address as gs://bucket/folder (docs/guide.md).
        loss_fn: instead of `config.rl.loss`: fn(log_prob, old_log_prob, advantage, mask, hyper) -> [k], of one stream.
        began: `time.monotonic()` from which the time to the first update counts that is printed; None: now.
        start: another run, RUN or RUN:MEMBER, whose final state this one starts from; `rl.iterations` are then those
            behind it. Keys continue its count, so that no episode repeats.

    Raises:
        ValueError: a setting is wrong, or the reward function or the training gave no finite number.
        FileNotFoundError: the model folder is missing.
        FileExistsError: `workdir` holds another experiment.
    """
    result = loop.train(config, reward_fn, workdir, loss_fn, began, start)
    return result._replace(report=multihost.first(lambda: write_report(result.workdir)))
