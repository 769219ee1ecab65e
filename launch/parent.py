"""The configuration of another run, which --from without --config starts with: `launch/parent.py:RUN[:MEMBER]`."""


def get_config(address):
    from kl_reg import config as configs
    from kl_reg.runs import directory

    found = directory.parse(address)
    if found is None:
        raise FileNotFoundError(f"--from={address!r}: there is no run; give RUN or RUN:MEMBER, as runs/x:3")
    config = directory.config_of(found.workdir)
    if found.member is not None:
        members = configs.members(config)
        if found.member >= len(members):
            raise FileNotFoundError(f"--from={address!r}: there are members 0 to {len(members) - 1}")
        config.update_from_flattened_dict(members[found.member])
        config.sweep = []
    return config
