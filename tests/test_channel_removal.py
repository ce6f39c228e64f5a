"""A network whose channels were removed against its twin in which they are 0."""

import copy

import pytest
import torch
from small_networks import ODD, PLAIN, POOLED, images, network, quantized, saved

from nnc_utils import artifact, encoding, models
from nnc_utils.pruning import channel_removal

SPECS = pytest.mark.parametrize("spec", [ODD, POOLED, PLAIN], ids=["odd", "pooled", "plain"])


def some(width, share=0.6):
    """A part of the channels, not in order."""
    return torch.randperm(width, generator=torch.Generator().manual_seed(width))[: max(1, int(share * width))]


def widths(spec):
    return {layer.name: layer.out_channels for layer in models.layers(spec)}


def silenced(model, group, kept):
    """The network with a group's other channels at 0 behind every layer that writes them."""
    twin = copy.deepcopy(model)
    norms = {layer.name: layer.batch_norm for layer in models.layers(model.spec)}
    for writer in group.writers:
        norm = twin.get_submodule(norms[writer])
        off = ~torch.isin(torch.arange(norm.num_features), kept)
        norm.weight.data[off], norm.bias.data[off] = 0, 0
    return twin


@SPECS
def test_every_convolution_is_written_once_and_the_readers_fit(spec):
    groups, layers = channel_removal.groups(spec), {layer.name: layer for layer in models.layers(spec)}
    assert sorted(name for g in groups.values() for name in g.writers) == sorted(set(layers) - {"fc"})
    assert sorted(name for g in groups.values() for name in g.readers) == sorted(set(layers) - {"conv1"})
    for name, group in groups.items():
        assert {layers[writer].out_channels for writer in group.writers} == {layers[name].out_channels}
        assert {layers[reader].in_channels for reader in group.readers} == {layers[name].out_channels}


def test_a_residual_stream_is_one_group():
    groups = channel_removal.groups(models.resnet(18))
    assert groups["conv1"].writers == ("conv1", "layer1.0.conv2", "layer1.1.conv2")
    first = ("layer1.0.conv1", "layer1.1.conv1", "layer2.0.conv1", "layer2.0.downsample.0")
    assert groups["conv1"].readers == first and groups["layer1.0.conv1"].readers == ("layer1.0.conv2",)
    assert groups["layer4.0.conv2"].writers == ("layer4.0.conv2", "layer4.0.downsample.0", "layer4.1.conv2")
    assert len(groups) == 4 + 8  # streams, and what is inside the blocks


@pytest.mark.parametrize("spec", [ODD, PLAIN], ids=["odd", "plain"])
def test_each_group_alone_equals_the_masked_twin(spec):
    model, inputs = network(spec), images(spec, 8)
    for name, group in channel_removal.groups(spec).items():
        kept = some(widths(spec)[name])
        narrow = channel_removal.remove_channels(model, {name: kept})
        with torch.inference_mode():
            assert torch.allclose(narrow(inputs), silenced(model, group, kept)(inputs), atol=1e-4), name
        assert models.parameters(narrow.spec) < models.parameters(spec)


@SPECS
def test_all_groups_together_and_once_more(spec, tmp_path):
    model, inputs, twin = network(spec), images(spec, 4), network(spec)
    once = {name: some(widths(spec)[name], 0.7) for name in channel_removal.groups(spec)}
    for name, group in channel_removal.groups(spec).items():
        twin = silenced(twin, group, once[name])
    narrow = channel_removal.remove_channels(model, once)
    counted = sum(p.numel() for p in narrow.parameters())
    assert counted == models.parameters(narrow.spec) < models.parameters(spec)
    second = {name: torch.arange(max(1, len(numbers) - 1)) for name, numbers in once.items()}
    both = {name: numbers.sort().values[second[name]] for name, numbers in once.items()}
    again, at_once = (
        channel_removal.remove_channels(narrow, second),
        channel_removal.remove_channels(model, both),
    )
    stored = saved(narrow, tmp_path / "narrow.safetensors")
    with torch.inference_mode():
        assert torch.allclose(narrow(inputs), twin(inputs), atol=1e-4)
        assert torch.equal(again(inputs), at_once(inputs)) and again.spec == at_once.spec
        assert torch.allclose(artifact.network(stored)(inputs), narrow(inputs), atol=1e-6)


def test_masks_and_activation_ranges_stay_and_the_order_of_channels_is_nothing():
    model, inputs = network(PLAIN), images(PLAIN, 4)
    for layer in models.layers(PLAIN):
        module = model.get_submodule(layer.name)
        mask = torch.rand(module.weight.shape, generator=torch.Generator().manual_seed(1)) < 0.5
        encoding.attach(module, encoding.Dense(module.weight.detach() * mask, mask))
    for place in models.activations(model).values():
        place.scale, place.zero_point = 0.1, 3
    narrow = channel_removal.remove_channels(model, {"layer3.0.conv1": torch.tensor([4, 0, 9])})
    mask, whole = (encoding.mask_of(net.layer3[0].conv2) for net in (narrow, model))
    assert torch.equal(mask, whole[:, [0, 4, 9]]) and (narrow.layer3[0].conv2.weight[~mask] == 0).all()
    assert {(p.scale, p.zero_point) for p in models.activations(narrow).values()} == {(0.1, 3)}
    everything = {name: torch.randperm(widths(PLAIN)[name]) for name in channel_removal.groups(PLAIN)}
    with torch.inference_mode():
        assert torch.equal(channel_removal.remove_channels(model, everything)(inputs), model(inputs))


def test_a_quantized_network_is_refused():
    with pytest.raises(ValueError, match="conv1 is quantized: prune first"):
        channel_removal.remove_channels(quantized(network(PLAIN)), {"conv1": torch.arange(4)})


@pytest.mark.parametrize("name", ["conv1", "layer2.0.conv1", "layer3.0.conv2"])
def test_torch_pruning_removes_the_same(name):
    library = pytest.importorskip("torch_pruning")
    model, inputs, kept = network(PLAIN), images(PLAIN, 8), some(widths(PLAIN)[name])
    ours, theirs = channel_removal.remove_channels(model, {name: kept}), copy.deepcopy(model)
    graph = library.DependencyGraph().build_dependency(theirs, example_inputs=inputs[:1])
    gone = sorted(set(range(widths(PLAIN)[name])) - set(kept.tolist()))
    graph.get_pruning_group(theirs.get_submodule(name), library.prune_conv_out_channels, idxs=gone).prune()
    macs, parameters = library.utils.count_ops_and_params(theirs, inputs[:1])
    assert parameters == models.parameters(ours.spec)
    with torch.inference_mode():
        torch.testing.assert_close(ours(inputs), theirs.eval()(inputs), rtol=1e-4, atol=1e-4)
        # the library counts batch-norm's multiplications, too
        assert models.macs(ours.spec) <= macs < 1.1 * models.macs(ours.spec)


@pytest.mark.parametrize("gone", [["layer1.1"], ["layer1.0", "layer2.1", "layer4.1"], []])
def test_a_removed_block_is_its_identity(gone, tmp_path):
    """Behind a ReLU nothing is negative, so a block that adds nothing changes nothing."""
    model, inputs = network(PLAIN), images(PLAIN, 8)
    for place in models.activations(model).values():
        place.scale, place.zero_point = 0.01, 0
    twin = copy.deepcopy(model)
    for name in gone:
        twin.get_submodule(name).bn2.weight.data.zero_()
        twin.get_submodule(name).bn2.bias.data.zero_()
    shallow = channel_removal.remove_blocks(model, gone)
    assert models.parameters(shallow.spec) == sum(p.numel() for p in shallow.parameters())
    assert sum(map(len, shallow.spec.stages)) == 8 - len(gone)
    stored = saved(shallow, tmp_path / "shallow.safetensors")
    with torch.inference_mode():
        torch.testing.assert_close(shallow(inputs), twin(inputs), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(artifact.network(stored)(inputs), shallow(inputs))


@pytest.mark.parametrize(
    ("gone", "said"),
    [
        (["layer2.0"], "layer2.0 cannot be removed: each once, of layer1.0, layer1.1, layer2.1"),
        (["layer2.1", "layer2.1"], "layer2.1, layer2.1 cannot be removed: each once"),
        (["layer1.0", "layer1.1"], "a stage has no block left"),
    ],
)
def test_blocks_that_have_to_stay_are_named(gone, said):
    with pytest.raises(ValueError, match=said):
        channel_removal.remove_blocks(network(PLAIN), gone)
