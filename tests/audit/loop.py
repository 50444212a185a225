"""An audit by hand: plain passes of a network with forward hooks on its gates"""
import torch
from networks import correct_targets, make_batch

from dreal_timm.attention.readers import readers_of


def batches_of(model, sizes=(5, 3, 4), size=64, num_classes=7):
    """Batches of random images whose targets the model gets right, but for two of each batch."""
    model.eval()
    made = []
    for seed, count in enumerate(sizes):
        images, _ = make_batch(count, size, num_classes, seed=seed, dtype=next(model.parameters()).dtype)
        made.append((images, correct_targets(model, images)))
    return made


def oracle(model, images, target, site, constant=None):
    """Log-probability and correctness with one map replaced, by a forward hook on its gate in a plain pass."""
    module = model.get_submodule(site.module)
    gate = module.get_submodule(readers_of(module)[0].gate)

    def flatten(gate, args, output):
        if constant is not None:
            return constant.expand_as(output)
        return output.mean(tuple(range(1, output.ndim)), keepdim=True).expand_as(output)

    handle = gate.register_forward_hook(flatten)
    with torch.no_grad():
        logits = model.eval()(images)
    handle.remove()
    log_p = logits.log_softmax(1).gather(1, target[:, None]).squeeze(1)
    return log_p, logits.argmax(1) == target


def maps_of(model, images, site):
    module = model.get_submodule(site.module)
    gate = module.get_submodule(readers_of(module)[0].gate)
    seen = []
    handle = gate.register_forward_hook(lambda gate, args, output: seen.append(output))
    with torch.no_grad():
        model.eval()(images)
    handle.remove()
    return seen[-1]
