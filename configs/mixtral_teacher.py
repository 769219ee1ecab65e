"""The paper's experiment at its size: the teacher is an agent on a frozen Mixtral-8x7B, with a hard budget of 10 nats
an episode; the reward is DistilBERT's sentiment of the student's replies.

    python -m launch.plan --config=configs/mixtral_teacher.py --topology=v5e:8x8
    python -m launch.train --config=configs/mixtral_teacher.py --workdir=runs/mixtral_10_0
    python -m launch.train --config=configs/mixtral_teacher.py --config.kl.budget=20. --config.seed=1 --workdir=...

Planned for 64 chips of a TPU v5e (docs/scaling.md); not run yet. The paper has three agents of 10 and three of 20 nats.
It is silent on the size of the agent, learning rate, episodes and iterations: those are ours.
"""
from kl_reg.config import default

OPENING = """\
 Student: Good morning! Are we going to talk about the water cycle today?

 Teacher: Yes, we are. Who remembers what happens to the water in a puddle when the sun shines on it?

 Student: It evaporates and goes up into the air.

"""


def get_config():
    config = default()
    config.model.path, config.model.dtype = "mistralai/Mixtral-8x7B-v0.1", "bfloat16"
    config.env.opening = OPENING
    config.env.teacher, config.env.student, config.env.end = " Teacher:", " Student:", "\n"
    config.env.markers = "written"              # whoever has the turn writes the next speaker's marker
    config.env.length = 256
    config.env.opening_tokens = 80              # that the opening has, about; a plan without the tokenizer reads it
    config.reward.name = "classifier"
    config.reward.path = "distilbert/distilbert-base-uncased-finetuned-sst-2-english"
    config.policy.kind, config.policy.layers, config.policy.hidden = "head", 3, 512
    config.kl.budget = 10.0
    config.rl.episodes, config.rl.minibatches, config.rl.iterations = 64, 8, 200
    config.optim.learning_rate = 3e-4
    config.evaluation.episodes = 256
    config.model.remat = "layers"               # of lora and full, whose updates read the trunk
    config.parallel.expert, config.parallel.tensor = 8, -1
    return config
