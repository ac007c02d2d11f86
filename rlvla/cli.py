"""`rlvla VERB [key=value ...]`: one verb a job. Nothing heavy is imported before the verb is known."""

import signal
import sys
from typing import Any

VERBS = {
    "collect": "record a scripted expert's demonstrations as a LeRobotDataset v3",
    "sft": "train a policy on demonstrations",
    "train": "refine a policy with PPO and prove what it gained",
    "tune": "look for the settings with which train does best",
    "eval": "measure a policy on held-back initial states",
    "forgetting": "measure what a policy's language model has lost, on questions of yours",
    "compare": "say what one policy gained and lost against another, suite by suite, with exact tests",
    "suites": "list the suites and what each lacks on this machine, or set one up",
    "import": "turn a checkpoint of LeRobot, openpi or starVLA into a policy folder",
    "export": "write an imported policy back in the format it came from",
    "serve": "answer the websocket clients of openpi and starVLA, so that other harnesses and robots can use a policy",
    "doctor": "say what works on this machine, how to cure the rest, and what memory a run takes",
}

POSITIONAL = {
    "eval": "       rlvla eval POLICY... suites=[NAME,...] [key=value ...]   its options: add suites=[NAME] to this",
    "compare": "       rlvla compare BEFORE AFTER suites=[NAME,...] [key=value ...]   policy folders or result files",
    "suites": "       rlvla suites [list|status|setup] [NAME ...]",
    "import": "       rlvla import FORMAT CHECKPOINT output=FOLDER suite=NAME [key=value ...]",
    "export": "       rlvla export POLICY output=FOLDER",
    "serve": "       rlvla serve POLICY [key=value ...]",
}
"""Of verbs that take words without a key."""

EXAMPLES = """examples:
  rlvla collect output=datasets/push_cube episodes=100
  rlvla sft dataset=datasets/push_cube output=runs/sft
  rlvla train policy=runs/sft/policy output=runs/ppo algo.target_kl=0.1
  rlvla tune policy=runs/sft/policy output=runs/tune iterations=16 tune.trials=20
  rlvla train @runs/tune/best.yaml output=runs/best
  rlvla eval policy=runs/ppo/policy suite=push_cube eval.trials=200 output=runs/eval
  rlvla forgetting before=runs/sft/policy after=runs/ppo/policy questions=questions.jsonl
  rlvla eval runs/sft/policy runs/ppo/policy suites=[simpler_env,simpler_env_ood]
  rlvla compare runs/sft/policy runs/ppo/policy suites=[simpler_env,simpler_env_ood] eval.trials=100
  rlvla import lerobot downloads/smolvla output=policies/smolvla suite=push_cube
  rlvla export runs/ppo/policy output=refined
  rlvla serve runs/ppo/policy port=8000
  rlvla doctor policy=qwen_vla_4b suite=simpler_env device_memory_gb=80"""


def main(argv: list[str] | None = None) -> None:
    """Run a verb; exit 2 for what a user can correct, 1 for what broke or does not work here, 130 for Ctrl-C,
    143 for SIGTERM."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in arguments
    arguments = [a for a in arguments if a != "--debug"]
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        _say(_help())
        return
    if arguments[0] in ("-V", "--version"):
        from rlvla import __version__

        print(f"rlvla {__version__}")
        return
    verb, *overrides = arguments
    if verb not in VERBS:
        import difflib

        close = difflib.get_close_matches(verb, VERBS, n=1)
        hint = f" Did you mean {close[0]!r}?" if close else ""
        _stop(f"unknown verb {verb!r}.{hint} Verbs: {', '.join(VERBS)}.", 2)
    before = signal.signal(signal.SIGTERM, _terminate)
    try:
        if "-h" in overrides or "--help" in overrides:
            _say(_verb_help(verb, [o for o in overrides if o not in ("-h", "--help")]))
            return
        _run(verb, overrides)
    except KeyboardInterrupt as interrupt:
        _stop_interrupted(verb, interrupt)
    except Exception as error:
        if (cause := _interrupt_behind(error)) is not None:
            _stop_interrupted(verb, cause)
        if debug:
            raise
        _stop(_one_message(error), 2 if isinstance(error, ValueError | OSError) else 1)
    finally:
        signal.signal(signal.SIGTERM, before)


def _run(verb: str, overrides: list[str]) -> None:
    import importlib
    import json
    import warnings

    # Third-party deprecations are for their authors, and would tear the live table apart.
    warnings.filterwarnings("ignore", category=DeprecationWarning)
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", category=UserWarning)
    from rlvla.compose import compose, to_yaml

    show = [o for o in overrides if o in ("--cfg", "--resolve", "job")]
    config = compose(verb, [o for o in overrides if o not in show])
    if show:
        _say(to_yaml(config).removesuffix("\n"))
        return
    _quieten()
    modules = {"EvaluateConfig": "evaluate", "EvaluateSuitesConfig": "evaluate_suites"}
    modules |= {"ImportConfig": "formats.importing", "ExportConfig": "formats.exporting"}
    module = modules.get(type(config).__name__, verb)
    summary: dict[str, Any] = importlib.import_module(f"rlvla.{module}").run(config)
    print(json.dumps(summary))
    if not summary.get("ok", True):
        raise SystemExit(1)


def _say(text: str) -> None:
    """Print what a user may read through `head`, which leaves before the end."""
    import os

    try:
        print(text, flush=True)
    except BrokenPipeError:
        # Or the interpreter complains when it closes the stream.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _quieten() -> None:
    """Libraries that announce missing accelerators on every start say nothing a CPU user can act on."""
    import logging
    import os

    # transformers sets its own level when it is imported, so the logger alone does not hold.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    for name in ("transformers", "mani_skill", "ray"):
        logging.getLogger(name).setLevel(logging.ERROR)
    logging.getLogger("mani_skill").disabled = True


def _help() -> str:
    verbs = "\n".join(f"  {verb:12s}{text}" for verb, text in VERBS.items())
    return (
        "usage: rlvla VERB [@FILE] [key=value ...] [--cfg] [--debug]\n\n"
        "Reinforcement-learning fine-tuning of flow-matching vision-language-action policies.\n\n"
        f"{verbs}\n\n"
        "  rlvla VERB @FILE    the settings of a file, as in configs/recipe; later ones win\n"
        "  rlvla VERB --help   every option of a verb\n"
        "  rlvla VERB --cfg    the resolved configuration, without running\n"
        "  --debug             a traceback instead of a message\n\n"
        f"{EXAMPLES}"
    )


def _verb_help(verb: str, overrides: list[str]) -> str:
    import textwrap

    from rlvla.compose import describe, group_choices

    lines = [f"usage: rlvla {verb} [key=value ...]", "", VERBS[verb], ""]
    if verb in POSITIONAL:
        lines[2:2] = [POSITIONAL[verb], ""]
    for group, choices in group_choices(verb).items():
        lines.append(f"  {group}={'|'.join(choices)}")
    shown = f"as {' '.join(overrides)} sets them" if overrides else "with their defaults"
    lines += ["", f"options, {shown}:", ""]
    for key, default, meaning in describe(verb, overrides):
        lines.append(f"  {key}={default}")
        lines += textwrap.wrap(meaning, 96, initial_indent="      ", subsequent_indent="      ")
    return "\n".join(lines)


def _one_message(error: Exception) -> str:
    import errno

    known = isinstance(error, ValueError | RuntimeError | OSError)
    text = str(error).strip() or type(error).__name__
    if (
        isinstance(error, OSError)
        and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
        and "output=" not in text
    ):
        return f"cannot write: {text}. Free some space or choose another output=; what was saved before this stands."
    if known:
        return text
    return f"{type(error).__name__}: {text}\nThis is a bug in rlvla. Run again with --debug and report the traceback."


class Terminated(KeyboardInterrupt):
    """SIGTERM, which a scheduler sends before it kills: the same way out as Ctrl-C."""


def _terminate(number: int, frame: object) -> None:
    # Once: what is put in order meanwhile is not interrupted by an impatient sender.
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    raise Terminated


def _stop_interrupted(verb: str, interrupt: KeyboardInterrupt) -> None:
    from rlvla.run import RESUMABLE

    what, status = ("terminated", 143) if isinstance(interrupt, Terminated) else ("interrupted", 130)
    _stop(f"{what}." + (" The same command goes on with this run." if verb in RESUMABLE else ""), status)


def _interrupt_behind(error: BaseException | None) -> KeyboardInterrupt | None:
    """A library that is interrupted while it puts things in order may end with an error of its own: OmegaConf does."""
    while error is not None:
        if isinstance(error, KeyboardInterrupt):
            return error
        error = error.__cause__ or error.__context__
    return None


def _stop(message: str, status: int) -> None:
    print(f"rlvla: {message}", file=sys.stderr)
    raise SystemExit(status)


if __name__ == "__main__":
    main()
