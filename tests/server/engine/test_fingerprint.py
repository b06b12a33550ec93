import pytest
import torch
from torch import nn

from headlong.server.engine import fingerprint
from headlong.server.engine.fingerprint import weights_fingerprint


def model(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    module = nn.Sequential(nn.Linear(40, 30), nn.BatchNorm1d(30), nn.Linear(30, 3).bfloat16())
    return module.requires_grad_(False)


def test_equal_weights_have_one_fingerprint() -> None:
    assert weights_fingerprint(model()) == weights_fingerprint(model())
    assert weights_fingerprint(model()) != weights_fingerprint(model(1))


def test_every_element_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    # So that weights are cut into parts.
    monkeypatch.setattr(fingerprint, "PART_BYTES", 100)
    before = weights_fingerprint(model())
    for name, tensor in (*model().named_parameters(), *model().named_buffers()):
        if name.endswith("num_batches_tracked"):
            continue
        for index in (0, tensor.numel() // 2, tensor.numel() - 1):
            changed = model()
            target = {**dict(changed.named_parameters()), **dict(changed.named_buffers())}[name]
            target.view(-1)[index] += 1
            assert weights_fingerprint(changed) != before, (name, index)


def test_parts_that_change_places_are_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fingerprint, "PART_BYTES", 4)
    module = nn.Linear(2, 1, bias=False)
    with torch.no_grad():
        module.weight.copy_(torch.tensor([[1.0, 2.0]]))
        before = weights_fingerprint(module)
        module.weight.copy_(torch.tensor([[2.0, 1.0]]))
    assert weights_fingerprint(module) != before


def test_shape_and_dtype_count() -> None:
    plain = nn.Linear(4, 2, bias=False)
    nn.init.zeros_(plain.weight)
    wide = nn.Linear(2, 4, bias=False)
    nn.init.zeros_(wide.weight)
    half = nn.Linear(4, 4, bias=False).half()
    nn.init.zeros_(half.weight)
    assert len({weights_fingerprint(each) for each in (plain, wide, half)}) == 3


def test_codes_and_scales_of_quantised_weights_count() -> None:
    quantization = pytest.importorskip("torchao.quantization")

    def quantised() -> nn.Linear:
        torch.manual_seed(0)
        layer = nn.Linear(64, 16, bias=False).bfloat16().requires_grad_(False)
        config = quantization.Int8WeightOnlyConfig(set_inductor_config=False)
        quantization.quantize_(layer, config)
        return layer

    before = weights_fingerprint(quantised())
    assert weights_fingerprint(quantised()) == before
    for part in ("qdata", "scale"):
        changed = quantised()
        getattr(changed.weight, part).view(-1)[-1].add_(1)
        assert weights_fingerprint(changed) != before, part
