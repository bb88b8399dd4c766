"""The checks of its settings that `twinlens serve` makes before it starts anything."""

from dataclasses import replace
from pathlib import Path

from common.adapter_names import adapters_of
from common.address import bound_socket, host_port
from common.buckets import parse_buckets
from common.checkpoint import Checkpoint, open_checkpoint
from common.config import BadSetting, check_values, flag
from common.lora import open_adapter
from common.settings import ServeSettings
from common.vision_artefact import check_artefact_settings, open_artefact
from services.launcher.autoscale import parse_bounds


def check(settings: ServeSettings) -> ServeSettings:
    """Return the settings with the served model's name filled in.

    Raises
    ------
    BadSetting
        If a setting cannot work; the message names its flag.
    BadCheckpoint
        If the model directory cannot be served.
    """
    check_values(settings)
    checkpoint = open_checkpoint(settings.model, settings.embeddings)
    checkpoint.sizes.check_fits(settings.tp)
    check_scaling(settings)
    length = settings.max_model_len
    if length and (objection := checkpoint.objection_to_context(length)):
        raise BadSetting(f"--max-model-len {length}: {objection}")
    parse_buckets(settings.vision_buckets, checkpoint.patches_per_token)
    if settings.vision_artefact:
        artefact = open_artefact(settings.vision_artefact)
        check_artefact_settings(artefact, vars(settings), checkpoint.fingerprint)
    if settings.http_port == settings.grpc_port:
        raise BadSetting(
            f"--http-port and --grpc-port are both {settings.http_port}: set two different ports"
        )
    for name in ("http_port", "grpc_port"):
        check_port(settings.host, getattr(settings, name), flag(name))
    if settings.read and not Path(settings.read).is_file():
        raise BadSetting(f"--read {settings.read}: no such file")
    name = settings.served_model_name or checkpoint.name
    for path in adapters_of(settings, checkpoint.family, name).values():
        open_adapter(path, checkpoint, settings.max_lora_rank)
    return replace(without_unused_roles(settings, checkpoint), served_model_name=name)


def without_unused_roles(settings: ServeSettings, checkpoint: Checkpoint) -> ServeSettings:
    """Return the settings with no replicas of the roles that the model does not need.

    Raises BadSetting if the settings ask for such a role.
    """
    stages = checkpoint.family.stages_of(checkpoint)
    if "vision" not in stages:
        for name in ("autoscale", "vision_standby", "vision_buckets", "vision_artefact"):
            if getattr(settings, name):
                raise BadSetting(f"{flag(name)}: this model has no vision replicas; leave it out")
        settings = replace(settings, vision=0)
    return settings if "detokenizer" in stages else replace(settings, detokenizer=0)


def check_scaling(settings: ServeSettings) -> None:
    if settings.autoscale and settings.vision > (most := parse_bounds(settings.autoscale).most):
        raise BadSetting(
            f"--vision {settings.vision} with --autoscale {settings.autoscale}: start with at most "
            f"{most}"
        )


def check_port(host: str, port: int, name: str) -> None:
    try:
        bound_socket(host, port).close()
    except OSError as e:
        raise BadSetting(
            f"{name} {port}: cannot listen on {host_port(host, port)} ({e.strerror}); free it or "
            "set another"
        ) from e
