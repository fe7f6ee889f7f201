"""One step of every method as its official code computes it: dense logits and targets, plain loops, float64 losses.

Each function takes a method, of which it uses the encoders and reads the state, and a batch. It draws random numbers in
the order of the official code and returns the loss and the buffers after the step by name.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, kl_div, log_softmax, normalize


def rows(encoder, images):
    return normalize(encoder(images), dim=1)


@torch.no_grad()
def shuffled_rows(encoder, images):
    order = torch.randperm(len(images))
    return normalize(encoder(images[order]), dim=1)[torch.argsort(order)]


def logits(query, key, queue, temperature):
    query, key, queue = query.double(), key.double(), queue.double()
    return torch.cat([(query * key).sum(1, keepdim=True), query @ queue.T], dim=1) / temperature


def info_nce(method, query, key, labels=None):
    own = torch.zeros(len(query), dtype=torch.long)
    return cross_entropy(logits(query, key, method.queue.keys, method.config.temperature), own)


def same_class(method, labels):
    """Own key and queue entries of the row's class, [N, 1 + K] of 0 and 1."""
    same = (labels[:, None] == method.queue.labels[None]) & (labels[:, None] != -1)
    return torch.cat([torch.ones(len(labels), 1), same.float()], dim=1).double()


def unicon(method, query, key, labels):
    """dddzg/unimoco, losses.py."""
    target = same_class(method, labels)
    scores = logits(query, key, method.queue.keys, method.config.temperature)
    return torch.log(1 + ((1 - target) * scores.exp()).sum(1) * (target * (-scores).exp()).sum(1)).mean()


def sup_con(method, query, key, labels):
    """HobbitLong/SupContrast, losses.py, with the queue in place of the batch."""
    target = same_class(method, labels)
    scores = log_softmax(logits(query, key, method.queue.keys, method.config.temperature), dim=1)
    return -((target * scores).sum(1) / target.sum(1)).mean()


def co2(method, query, key, labels):
    """The paper's two KL terms over the negatives, as in lightly, but without the positive."""
    config = method.config
    first = log_softmax(query.double() @ method.queue.keys.double().T / config.consistency_temperature, dim=1)
    second = log_softmax(key.double() @ method.queue.keys.double().T / config.consistency_temperature, dim=1)
    term = kl_div(first, second, reduction="batchmean", log_target=True)
    term = 0.5 * (term + kl_div(second, first, reduction="batchmean", log_target=True))
    return info_nce(method, query, key) + config.consistency_weight * term


def enqueued(queue, keys, labels, step, name="queue"):
    """The queue after one more write, slot by slot as in moco/builder.py."""
    new_keys, new_labels = queue.keys.clone(), queue.labels.clone()
    for index, (key, label) in enumerate(zip(keys, labels, strict=True)):
        slot = (step * len(keys) + index) % len(new_keys)
        new_keys[slot], new_labels[slot] = key, label
    return {f"{name}.keys": new_keys, f"{name}.labels": new_labels}


def moco(loss):
    """facebookresearch/moco, builder.py; symmetric as in the notebook on branch colab-notebook."""

    def step(method, batch):
        first, second = batch.views
        second_keys = shuffled_rows(method.key_encoder, second)
        total = loss(method, rows(method.query_encoder, first), second_keys, batch.labels)
        keys, labels = second_keys, batch.labels
        if method.config.symmetric:
            first_keys = shuffled_rows(method.key_encoder, first)
            total = total + loss(method, rows(method.query_encoder, second), first_keys, batch.labels)
            keys, labels = torch.cat([first_keys, second_keys]), batch.labels.repeat(2)
        return total, enqueued(method.queue, keys, labels, batch.step)

    return step


def mixco(method, batch):
    """Lee-Gihun/MixCo: moco/models/encoder.py and utils/loss_fn.py, with neighbors as pairs."""
    config, images = method.config, batch.views[0]
    weight = torch.rand(len(images) // 2)
    everything = []
    for pair in range(len(images) // 2):
        first, second = images[2 * pair], images[2 * pair + 1]
        everything += [first, second, weight[pair] * first + (1 - weight[pair]) * second]
    # Another memory format rounds differently, which flips some ReLUs
    features = rows(method.query_encoder, torch.stack(everything).contiguous(memory_format=torch.channels_last))
    mixed, query = features[2::3], features[torch.arange(len(features)) % 3 != 2]
    key = shuffled_rows(method.key_encoder, batch.views[1])
    bank = torch.cat([key, method.queue.keys]).double()
    target = torch.zeros(len(mixed), len(bank), dtype=torch.float64)
    for pair in range(len(mixed)):
        target[pair, 2 * pair], target[pair, 2 * pair + 1] = weight[pair], 1 - weight[pair]
    mix = -(target * log_softmax(mixed.double() @ bank.T / config.mix_temperature, dim=1)).sum(1).mean()
    loss = info_nce(method, query, key) + config.mix_weight * mix
    return loss, enqueued(method.queue, key, batch.labels, batch.step)


def unmix(method, batch):
    """szq0214/Un-Mix, moco_cifar10.py and the README's pseudo-code, with the neighbor as partner."""
    images = batch.views[0]
    size = images.shape[2]
    chance, weight, center_y, center_x = torch.rand(4).tolist()
    partner = torch.arange(len(images)) ^ 1
    if chance < method.config.global_probability:
        mixed = weight * images + (1 - weight) * images[partner]
    else:
        cut = int(size * (1 - weight) ** 0.5)
        top, bottom = (min(max(int(center_y * size) + side * (cut // 2), 0), size) for side in (-1, 1))
        left, right = (min(max(int(center_x * size) + side * (cut // 2), 0), size) for side in (-1, 1))
        mixed = images.clone()
        mixed[:, :, top:bottom, left:right] = images[partner][:, :, top:bottom, left:right]
        weight = 1 - (bottom - top) * (right - left) / size**2
    query = rows(method.query_encoder, mixed)
    loss, state = moco(info_nce)(method, batch)
    keys_a_step = len(images) * method.config.keys_per_image
    slots = (batch.step * keys_a_step + torch.arange(keys_a_step)) % len(method.queue.keys)
    for key in state["queue.keys"][slots].split(len(images)):
        loss = loss + weight * info_nce(method, query, key) + (1 - weight) * info_nce(method, query, key[partner])
    return loss, state


def soft_target_loss(student, teacher, queue, config):
    target = (teacher.double() @ queue.double().T / config.teacher_temperature).softmax(1)
    return -(target * log_softmax(student.double() @ queue.double().T / config.temperature, dim=1)).sum(1).mean()


def ressl(method, batch):
    """KyleZheng1997/ReSSL, network/ressl.py."""
    teacher = shuffled_rows(method.key_encoder, batch.views[1])
    loss = soft_target_loss(rows(method.query_encoder, batch.views[0]), teacher, method.queue.keys, method.config)
    return loss, enqueued(method.queue, teacher, batch.labels, batch.step)


def msvq(method, batch):
    """pc-cp/MSVQ, network/msvq.py."""
    config, student = method.config, rows(method.query_encoder, batch.views[0])
    z2, z3 = (shuffled_rows(method.key_encoder, view) for view in batch.views[1:3])
    z4 = shuffled_rows(method.second_key_encoder, batch.views[3])
    loss = soft_target_loss(student, z2, method.queue.keys, config)
    loss = loss + soft_target_loss(student, z3, method.queue.keys, config)
    loss = loss + soft_target_loss(student, z4, method.second_queue.keys, config)
    state = enqueued(method.queue, z2, batch.labels, batch.step)
    state |= enqueued(method.second_queue, z4, batch.labels, batch.step, name="second_queue")
    return loss / 3, state


def smog(method, batch):
    """SMoG_code.zip: main_SMoG.py and two_stream_network.py, crop by crop, with batch norm by resolution."""
    config, count = method.config, len(batch.ids)
    projection = method.query_encoder(torch.cat(batch.views[:2]))
    prediction = [method.predictor(projection)]
    if batch.views[4:]:
        prediction.append(method.predictor(method.query_encoder(torch.cat(batch.views[4:]))))
    crops = normalize(torch.cat(prediction), dim=1).double().split(count)
    projections = normalize(projection, dim=1).split(count)
    with torch.no_grad():
        keys = rows(method.key_encoder, torch.cat(batch.views[2:4])).double().split(count)
    total, moved = 0.0, []
    for head in range(config.heads):
        old, features = method.groups[head].double(), projections[head % 2].double()
        assigned = (features @ old.T).argmax(1)
        groups = []
        for index, group in enumerate(old):
            members = features[assigned == index]
            if len(members):
                weight = method.group_momentum.double()
                group = weight * group + (1 - weight) * members.mean(0)
            groups.append(group)
        new = normalize(torch.stack(groups), dim=1)
        moved.append(new.detach().float())
        scored = new if config.groups_gradient else new.detach()
        for key in keys:
            target = (key @ old.T).argmax(1)
            for crop in crops:
                total = total + cross_entropy(crop @ scored.T / config.temperature, target)
    state: dict[str, Tensor] = {"groups": torch.stack(moved)}
    none = torch.full((count,), -1)
    for index, row in enumerate(projections):
        state |= enqueued(method.banks[index], row.detach(), none, batch.step, name=f"banks.{index}")
    return total / (config.heads * len(keys) * len(crops)), state


STEPS = {
    "mocov1": moco(info_nce),
    "mocov2": moco(info_nce),
    "unimoco": moco(unicon),
    "supcon": moco(sup_con),
    "co2": moco(co2),
    "mixco": mixco,
    "unmix": unmix,
    "ressl": ressl,
    "msvq": msvq,
    "smog": smog,
}
