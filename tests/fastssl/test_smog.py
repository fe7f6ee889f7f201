"""Parts of SMoG: groups, their banks and k-means, and the gradient through them."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import normalize

from fastssl.errors import ConfigError
from fastssl.methods import METHODS
from fastssl_pipelines.views import ViewSpec
from tests.fastssl.small_methods import BATCH, STEPS_PER_EPOCH, a_batch, a_step, build, one_loss, sgd
from tests.fastssl.transcriptions import rows


def test_the_gradient_through_smogs_groups_can_be_switched_off():
    (with_groups, through), (without, stopped) = one_loss("smog"), one_loss("smog", groups_gradient=False)
    assert torch.equal(with_groups, without)
    assert (through - stopped).norm() > 1e-3 * stopped.norm()


def test_smogs_groups_with_momentum_one_do_not_move():
    method = build("smog")
    method.group_momentum.fill_(1.0)
    before = method.groups.clone()
    a_step(method, sgd(method), a_batch("smog", 3))
    torch.testing.assert_close(method.groups, before, rtol=0, atol=1e-6)


def test_smog_makes_new_groups_at_the_end_of_an_epoch():
    method = build("smog", momentum=0.5)
    for step in range(STEPS_PER_EPOCH):
        a_step(method, sgd(method), a_batch("smog", step))
    for query, key in zip(method.query_encoder.parameters(), method.key_encoder.parameters(), strict=True):
        assert torch.equal(query, key)
    for head, groups in enumerate(method.groups):
        bank = method.banks[head % 2].keys
        assigned = (bank @ groups.T).argmax(1)
        for group in assigned.unique():
            # Ten rounds are enough for 40 rows and 6 groups to converge
            torch.testing.assert_close(groups[group], normalize(bank[assigned == group].mean(0), dim=0))


def test_smog_prepares_its_banks_and_groups_from_one_epoch():
    method = build("smog", bank_size=100)
    torch.manual_seed(0)
    method.prepare(iter([a_batch("smog", step) for step in range(3)]))
    twin = build("smog", bank_size=100)
    with torch.no_grad():
        for step in range(3):  # The same passes, as they update the batch norm's statistics
            expected = rows(twin.query_encoder, torch.cat(a_batch("smog", step).views[:2])).split(BATCH)
    for bank, row in zip(method.banks, expected, strict=True):
        torch.testing.assert_close(bank.keys[2 * BATCH : 3 * BATCH], row, rtol=1e-5, atol=1e-6)
    for groups in method.groups:
        torch.testing.assert_close(groups.norm(dim=1), torch.ones(6))


def test_smog_refuses_more_groups_than_an_epoch_has_images():
    method = build("smog", groups=30, bank_size=100)
    with pytest.raises(ConfigError, match=r"30 groups were asked for and there are 16 images.*--method.groups"):
        method.prepare(iter([a_batch("smog", 0)]))


def test_smog_refuses_views_of_mixed_sizes():
    with pytest.raises(ConfigError, match=r"views of \[16, 16, 16, 8\] pixels were given to smog.*`views`"):
        METHODS["smog"].check_views(tuple(ViewSpec(size=size) for size in (16, 16, 16, 8)))
