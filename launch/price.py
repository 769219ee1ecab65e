r"""What it costs, in nats under a model, that the teacher says the same thing turn after turn.

    python -m launch.price --model=smollm2
    python -m launch.price --model=smollm2 --script='' --script='Very good.' --turns=20
    python -m launch.price --model=embedded --teacher=A: --student=B: --max-reply=12 --opening='A: hello\nB: hi\n'

The student answers by sampling from the model itself. A policy that says the script with certainty pays exactly this
KL to the model, and e^10 is 22026: ten nats are what a thing costs that the model does once in 22026 conversations.
In texts of this command \n stands for a newline. docs/price.md explains the rest.
"""
from __future__ import annotations

import sys

from launch import command

OPENING = ("Good morning. How are you today?", "I'm fine, thank you. How are you?",
           "Very well, thanks. Did you do the reading?", "Yes, I did. I liked it a lot.")
SCRIPTS = ("", "Good.", "...")      # and random letters, as many as in "Good."


def _arguments(argv):
    parser = command.Parser("price", __doc__)
    parser.add_argument("--model", required=True, help="a model as in model.path")
    parser.add_argument("--script", action="append", type=command.text, metavar="TEXT",
                        help="what the teacher says; may be given several times (default: nothing, 'Good.', '...' and "
                        "five random letters)")
    parser.add_argument("--turns", type=int, default=10, help="scripted turns of an episode")
    parser.add_argument("--episodes", type=int, default=32, help="transcripts of each script")
    parser.add_argument("--max-reply", type=int, default=48, metavar="TOKENS",
                        help="where a student's reply is cut (default: 48)")
    opening = parser.add_mutually_exclusive_group()
    opening.add_argument("--opening", type=command.text, metavar="TEXT",
                         help="the transcript before the first scripted turn (default: four turns of small talk)")
    opening.add_argument("--opening-file", metavar="FILE")
    parser.add_argument("--teacher", type=command.text, default=" Teacher:", metavar="MARKER",
                        help="(default: ' Teacher:')")
    parser.add_argument("--student", type=command.text, default=" Student:", metavar="MARKER",
                        help="(default: ' Student:')")
    parser.add_argument("--student-temperature", type=float, default=1.0, metavar="T",
                        help="of the student's tokens alone (default: 1; the paper's authors have 0.05)")
    parser.add_argument("--end", type=command.text, default="\n", metavar="MARKER", help=r"of a turn (default: '\n')")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--batch", type=int, default=32, help="transcripts sampled at a time (default: 32)")
    parser.add_argument("--out", default="price", metavar="DIR",
                        help="for price.json and price.png (default: ./price)")
    return parser.parse_args(argv)


def main(argv=None):
    command.guarded(["price"], lambda: _run(sys.argv[1:] if argv is None else argv))


def _run(argv):
    args = _arguments(argv)
    command.check_whole(args, seed=0)
    from kl_reg import storage
    from kl_reg.analysis.behaviour import script_price, script_price_figure
    from kl_reg.pretrained import tokenizer, weights

    dialogue = script_price.Dialogue(args.teacher, args.student, args.end)
    opening = _opening(args, dialogue)
    scripts = args.script or [*SCRIPTS, script_price.random_letters(len("Good."), args.seed)]
    model, out = weights.load(args.model, setting="--model"), storage.path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    prices = script_price.price_of_script(model, [opening], scripts, args.turns, args.episodes, args.seed, dialogue,
                                          args.max_reply, args.batch, args.student_temperature)
    report = {"model": args.model, **dialogue._asdict(), "opening": opening, "turns": args.turns, "seed": args.seed,
              "max_reply": args.max_reply, "student_temperature": args.student_temperature,
              "scripts": script_price.report(prices, tokenizer.load(model.folder))}
    storage.write_json(out / "price.json", report, allow_nan=False)
    _print(report)
    title = f"{args.model}: the teacher says the same in every turn, the student samples; {args.episodes} episodes"
    figure = script_price_figure.draw(report["scripts"], title, out / "price.png")
    print(f"\nnumbers  {out / 'price.json'}\nfigure   {figure}")


def _text(file):
    from kl_reg import storage

    try:
        return storage.read_text(storage.path(file))
    except UnicodeDecodeError as error:
        raise ValueError(f"--opening-file={file} is not UTF-8: {error}") from None


def _opening(args, dialogue):
    if args.opening_file is not None:
        text = _text(args.opening_file)
    else:
        text = dialogue.transcript(OPENING) if args.opening is None else args.opening
    if text and not text.endswith(dialogue.end):
        raise ValueError(f"the opening ends in {text[-12:]!r}; the teacher is next, so it is to end with the end of a "
                         f"turn, {dialogue.end!r}")
    return text


def _print(report):
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    table = Table("turn", box=SIMPLE_HEAD)
    for script in report["scripts"]:
        table.add_column(escape(_name(script)), no_wrap=True, justify="right")
    for i in range(report["turns"]):
        table.add_row(str(i + 1), *(_cell(script["per_turn"], i) for script in report["scripts"]))
    table.add_section()
    table.add_row("all", *(_cell(script["cumulative"], -1) for script in report["scripts"]))
    console = Console()
    Console(width=max(100, console.width)).print(table)
    print("Nats per turn ± standard error over", report["scripts"][0]["episodes"], "episodes.")
    for script in report["scripts"]:
        if script["cut_replies"]:
            print(f"{_name(script)}: {script['cut_replies']} of {script['replies']} replies were cut at "
                  f"{report['max_reply']} tokens.")


def _name(script):
    return repr(script["script"]) if script["script"] else "silence"


def _cell(curve, i):
    error = curve["error"][i]
    return f"{curve['mean'][i]:.2f}" + ("" if error is None else f" ± {error:.2f}")


if __name__ == "__main__":
    main()
