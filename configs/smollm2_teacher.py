"""The paper's experiment on SmolLM2-135M: a head on the frozen model, a hard KL budget, VADER as the reward.

    python -m launch.fetch smollm2
    python -m launch.train --config=configs/smollm2_teacher.py --workdir=runs/teacher

The agent is the teacher, the model itself the student. An iteration takes 25 seconds on two cores, the whole with its
evaluation a quarter of an hour. The same with budgets of 10 and 20 nats and without one, three seeds each, at 150 to
200 seconds an iteration:

    python -m launch.sweep --config=configs/smollm2_teacher.py --workdir=runs/teachers

Empty turns of the teacher rise from 0% to 90, 94 and 94% at 10 nats, to 100, 62 and 100% at 20, and to 99, 11 and 100%
without a budget, where the second says "Good" instead; the return from 3.3 to 5.8 to 6.6. Silence takes 11 nats, of
which 6.3 go into the first turn.
"""
from kl_reg.config import default

OPENING = """\
Teacher: Good morning, Emma!
Student: Good morning!
Teacher: How are you today?
Student: I am fine, thanks.
Teacher: Did you like the book?
Student: Yes, it was fun.
"""


def get_config():
    config = default()
    config.model.path = "smollm2"
    config.env.opening = OPENING
    config.env.teacher, config.env.student = "Teacher:", "Student:"
    config.env.length = 128
    config.kl.budget = 20.0
    config.rl.episodes, config.rl.iterations = 16, 24
    config.evaluation.episodes = 64
    config.sweep = [{"kl.budget": (10.0, 20.0, None), "seed": (0, 1, 2)}]
    return config
