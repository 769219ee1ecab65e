"""One of two processes with four devices each: python worker.py ADDRESS:PORT,2,INDEX FOLDER PROMPTS WORKDIR OUT."""
import os
import pathlib
import pickle
import sys

os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=4"

import jax  # noqa: E402

from kl_reg.sharding import multihost  # noqa: E402

if __name__ == "__main__":
    address, folder, prompts, workdir, out = sys.argv[1:]
    multihost.join(address)
    import scenario

    import kl_reg
    from kl_reg.sharding import mesh as meshes

    own, mesh = scenario.case(folder, prompts, **scenario.KINDS["full"]), scenario.mesh_of(data=4, tensor=2)
    held = meshes.readable(scenario.sample(own, mesh))
    episodes = jax.device_get(held)
    updates, state = scenario.updates(own, episodes, mesh)
    query = state.params["trunk"]["layers"]["query"]["kernel"]

    config = scenario.experiment(folder, prompts)
    config.parallel.member, config.parallel.data = 2, -1
    result = kl_reg.train(config, scenario.reward, workdir)

    try:
        multihost.everywhere(lambda: {}["only here"] if jax.process_index() else None)
        raised = None
    except (KeyError, ValueError) as error:
        raised = f"{type(error).__name__}: {error}"
    pathlib.Path(out).write_bytes(pickle.dumps({
        "updates": updates, "tokens": episodes.transcript.tokens, "asked": scenario.ASKED, "raised": raised,
        "addressable": (query.is_fully_addressable, query.addressable_shards[0].data.shape),
        "summary": result.summary}))
