r"""Reads, or talks to, any model or any checkpoint of a run: every token of the agent in the colour of what it costs.

    python -m launch.sample runs/quickstart:3              # a member's last checkpoint; runs/quickstart:3@40 an earlier
    python -m launch.sample runs/quickstart:3 --talk       # you are the student
    python -m launch.sample embedded --episodes=2          # a model on its own, coloured by surprisal
    python -m launch.sample my-model --talk --chat         # an instruct model, in its own chat template

Transcripts have the exact KL to the run's reference, in nats, of each turn of the agent and of each episode, and the
return. In texts of this command \n stands for a line break. docs/sample.md says more.
"""
from __future__ import annotations

import codecs
import contextlib
import math
import signal
import sys
from functools import partial

from launch import command

_MARKERS = {"teacher": "before the agent's turns", "student": "before the student's turns", "end": "behind a turn",
            "opening": "before the first turn"}
_LONGEST = 1024      # tokens of a talk with a model: attention looks at every slot of the cache
_CEILINGS = {"kl": 3.0, "surprisal": 10.0}      # nats in full red, of a talk, whose largest is not known yet
_HELP = """Type what the student says; an empty line is an empty reply.
/retry  another turn of the agent instead of its last one
/quit   ends (ctrl-D as well); ctrl-C ends the agent's turn, or drops the line"""


def _arguments(argv):
    parser = command.Parser("sample", __doc__)
    parser.add_argument("policy", metavar="POLICY", help="RUN[:MEMBER][@ITERATION], or a model as in model.path")
    parser.add_argument("--episodes", type=int, help="transcripts (default: 4)")
    parser.add_argument("--seed", type=int, default=0, help="of the sampling; with that of a run's evaluation the "
                        "episodes are those of the evaluation")
    parser.add_argument("--openings", choices=("run", "held_out"), default="run",
                        help="how episodes begin: as in the run (default), or with turns of held-out conversations")
    parser.add_argument("--colour", choices=("kl", "surprisal"),
                        help="by the exact KL to the reference (default for a run), or by -log of the reference's "
                        "probability (default for a model, whose KL to itself is 0)")
    parser.add_argument("--length", type=int, help="tokens behind the opening (default: the run's; of a model 64, and "
                        f"in a talk what its context takes, {_LONGEST} at most)")
    parser.add_argument("--talk", action="store_true", help="a conversation: you are the student")
    parser.add_argument("--chat", action="store_true", help="with --talk and a model: in the model's chat template")
    for name, where in _MARKERS.items():
        parser.add_argument(f"--{name}", type=command.text, metavar="TEXT",
                            help=f"{where} (of a model; a run has its own)")
    args = parser.parse_args(argv)
    if args.talk and args.episodes is not None:
        parser.error("--talk is one conversation: leave --episodes out")
    args.episodes = 4 if args.episodes is None else args.episodes
    return args


def main(argv=None):
    try:
        command.guarded(["sample"], lambda: _run(sys.argv[1:] if argv is None else argv))
    except KeyboardInterrupt:
        sys.exit(130)


def _run(argv):
    args = _arguments(argv)
    changes = {name: getattr(args, name) for name in _MARKERS if getattr(args, name) is not None}
    _check(args, changes)
    from rich.console import Console

    from kl_reg.analysis.compare import single_policy

    console = Console(highlight=False, markup=False, emoji=False)
    with console.status(f"reading {args.policy}"):
        one = single_policy.open_policy(args.policy, args.openings, min(args.episodes, 32), changes,
                               None if args.chat else args.length)
        colour = args.colour or ("kl" if one.is_run else "surprisal")
        _check_policy(args, one, colour)
    (_talk if args.talk else _read)(console, args, one, colour)


def _check(args, changes):
    """Raises on flags that make no sense together."""
    command.check_whole(args, episodes=1, length=1, seed=0)
    if args.chat and not args.talk:
        raise ValueError("--chat is a way to --talk: give both")
    if args.chat and (changes or args.openings != "run"):
        raise ValueError("--chat: the model's chat template says what a conversation begins with and what stands "
                         f"between its turns; leave {', '.join(f'--{name}' for name in changes) or '--openings'} out")


def _check_policy(args, one, colour):
    """Raises on flags that this policy does not have."""
    if args.chat and one.is_run:
        raise ValueError(f"--chat is for a model; {args.policy} is a run and talks as in its training")
    if colour == "surprisal" and one.team.program.agent.constrained and one.team.program.algorithm.kl.config.drawn:
        raise ValueError("--colour surprisal: with kl.spend='sampled' what is recorded of a token has the amount in "
                         "it that was drawn for it")


def _in(one, env, length):
    """The policy in this environment, with so many tokens an episode."""
    from kl_reg.analysis.compare import single_policy

    longest = one.model.config.max_position - env.openings.tokens.shape[1]
    if length > longest:
        raise ValueError(f"--length {length}: behind the opening the model's context has room for {longest} tokens")
    return one._replace(team=single_policy.in_env(one.team, env._replace(length=length)))


def _read(console, args, one, colour):
    """Prints transcripts."""
    from kl_reg.analysis.compare import single_policy
    from kl_reg.analysis.report import terminal
    from kl_reg.pretrained import tokenizer
    from kl_reg.training import step
    from kl_reg.types import PAD

    env, (title, shown) = one.team.program.task.env, single_policy.SHOWN[colour]
    one = _in(one, env, args.length or env.length)
    with console.status("sampling"):
        episodes = single_policy.sample(one.team, args.episodes, args.seed)
    words, transcript = tokenizer.load(one.model.folder), episodes.transcript
    nats = single_policy.at_slots(episodes, shown(step.recorded(episodes)))
    heads = [[f"Episode {e}", terminal.amount(total)] for e, total in enumerate(nats.sum(1))]
    console.print(one.title, soft_wrap=True)
    console.print(terminal.legend(console, nats.max(), title))
    if one.is_run:
        try:
            for head, value in zip(heads, single_policy.returns(one, episodes), strict=True):
                head.insert(1, "not judged" if math.isnan(value) else f"return {value:.2f}")
        except (ValueError, OSError) as error:
            console.print(f"no returns: {error}", style=terminal.NOTE, soft_wrap=True)
    for e, head in enumerate(heads):
        roles = transcript.roles[e]
        pieces = tokenizer.pieces(words, transcript.tokens[e][roles != PAD].tolist())
        console.print(f"\n{' · '.join([*head, *['asked for help'] * bool(episodes.asked[e])])}", style="bold")
        console.print(terminal.episode(pieces, roles, transcript.turns[e], nats[e], nats.max()))


def _talk(console, args, one, colour):
    """The person is the student, or the user."""
    from kl_reg.analysis.compare import conversation, single_policy
    from kl_reg.analysis.report import terminal
    from kl_reg.pretrained import end_tokens, tokenizer

    with contextlib.suppress(ImportError):      # lines can be edited and recalled, where the platform has it
        import readline  # noqa: F401

    folder, env, (title, shown) = one.model.folder, one.team.program.task.env, single_policy.SHOWN[colour]
    words = tokenizer.load(folder)
    ends = frozenset() if one.is_run else frozenset(end_tokens.named(folder, words))
    manners = (conversation.as_user(partial(tokenizer.chat, words), ends) if args.chat
               else conversation.as_student(one.config.env, env, words, ends))
    longest = one.model.config.max_position - manners.env.openings.tokens.shape[1]
    one = _in(one, manners.env, args.length or (env.length if one.is_run else min(longest, _LONGEST)))
    manners = manners._replace(env=one.team.program.task.env)
    policy = conversation.compile_policy(one.team, shown)
    console.print(one.title, soft_wrap=True)
    console.print(terminal.legend(console, _CEILINGS[colour], title, more=True))
    console.print(f"{manners.env.length} tokens in all; /help says what else can be typed.\n", style=terminal.NOTE)
    writer = terminal.Writer(_CEILINGS[colour], console)
    with console.status("compiling"):
        moment, ids = policy.begin(args.seed)
    state = conversation.State(moment, tuple(ids), (), None, 0.0)
    _converse(console, writer, policy, manners, words, args.seed, float(one.team.hyper.kl_budget[0]), state)


def _converse(console, writer, policy, manners, words, seed, budget, state):
    """Turn after turn, until somebody has enough or there is no room."""
    from kl_reg.analysis.compare import conversation
    from kl_reg.analysis.report import terminal
    from kl_reg.pretrained import tokenizer
    from kl_reg.types import OPENING, PAD

    kept, attempts, agent = None, 0, not manners.opens
    for piece in tokenizer.pieces(words, state.ids) if agent else ():
        writer.token(piece, OPENING)
    while True:
        if agent:
            kept = state.kept()
            state = _agent(writer, policy, manners, words, state, budget)
        if state.moment.role == PAD:
            return console.print("The agent asks for help: what it may cost is less than its reference's missing mass.")
        if state.moment.position >= manners.env.length:
            return console.print(f"The {manners.env.length} tokens are full; --length says how many there are.")
        line, agent = _line(manners.person), False
        if line == "/quit":
            return None
        if line == "/retry" and kept is not None:
            attempts, agent = attempts + 1, True
            state = kept._replace(moment=policy.again(kept.moment, seed, attempts))
        elif line.startswith("/"):
            console.print(_HELP, style=terminal.NOTE)
        else:
            try:
                with _stoppable():
                    state, agent = conversation.person_turn(policy, manners, words, state, line), True
            except ValueError as error:
                console.print(f"{error}", style=terminal.NOTE)


def _agent(writer, policy, manners, words, state, budget):
    """One turn, shown as it comes. What the environment writes behind it is the prompt of the person's line."""
    from kl_reg.analysis.compare import conversation
    from kl_reg.analysis.report import terminal
    from kl_reg.pretrained import tokenizer
    from kl_reg.types import AGENT, FORCED

    decoder, before, held = codecs.getincrementaldecoder("utf-8")(errors="replace"), state.nats, [manners.agent]
    with _stoppable() as stopped:
        for after, spoken in conversation.agent_turn(policy, manners, state, stopped):
            state = after
            piece = decoder.decode(tokenizer.bytes_of(words, [spoken.token])[0])
            if spoken.role == FORCED:
                held.append(piece)
            elif spoken.role == AGENT:
                while held:
                    writer.token(held.pop(0), FORCED)
                writer.token(piece, AGENT, spoken.nats)
    left = f" · {budget - state.moment.spent:.2f} of {budget:g} left" if budget < float("inf") else ""
    writer.note(f"{terminal.amount(state.nats - before)} · {terminal.amount(state.nats)} in all{left}")
    writer.end()
    return state


@contextlib.contextmanager
def _stoppable():
    """Within, ctrl-C only makes the function that it gives true: a step that is cut would take the caches with it."""
    pressed = []
    before = signal.signal(signal.SIGINT, lambda *_: pressed.append(True))
    try:
        yield lambda: bool(pressed)
    finally:
        signal.signal(signal.SIGINT, before)


def _line(prompt):
    """What the person types; shown where it does not come from a keyboard."""
    while True:
        try:
            line = input(prompt)
        except EOFError:
            print()
            return "/quit"
        except KeyboardInterrupt:
            print()
            continue
        if not sys.stdin.isatty():
            print(line)
        return line


if __name__ == "__main__":
    main()
