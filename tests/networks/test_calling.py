"""diffusers models as networks: conditions reach them as meant, and nothing is ignored."""

import pytest
import torch

from pagoda.diffusion.conditions import UNCONDITIONAL, Condition
from pagoda.errors import ConfigError, ShapeError
from pagoda.networks import DiffusersNetwork, model_hash

X, T = torch.randn(3, 3, 8, 8, generator=torch.Generator().manual_seed(0)), torch.tensor([1.0, 2.0, 3.0])


def test_network_equals_the_model_itself(case):
    model, condition = case.network.model, case.condition
    labels = None
    if case.network.num_classes:
        labels = torch.where(condition.label < 0, case.network.num_classes, condition.label)
    arguments = {"class_labels": labels}
    if condition.tokens is not None:
        arguments |= {"encoder_hidden_states": condition.tokens, "encoder_attention_mask": condition.tokens_mask}
    assert torch.equal(case.network(case.x, case.t, condition), model(case.x, case.t, **arguments).sample)


def test_null_label_and_no_label_are_the_last_row_of_the_table(teacher):
    network = DiffusersNetwork(teacher)
    direct = teacher(X, T, class_labels=torch.full((3,), 5)).sample
    assert torch.equal(network(X, T, Condition.of_labels([-1, -1, -1])), direct)
    assert torch.equal(network(X, T), direct)
    assert not torch.equal(network(X, T, Condition.of_labels([0, 1, 2])), direct)


def test_sizes_are_read_from_the_model(teacher):
    network = DiffusersNetwork(teacher)
    assert (network.in_channels, network.num_classes, network.sample_size) == (3, 5, 8)


@pytest.mark.parametrize("label", [5, 17, -2])
def test_label_out_of_range_names_value_and_count(teacher, label):
    with pytest.raises(ConfigError, match=rf"label {label} .*5 classes"):
        DiffusersNetwork(teacher)(X, T, Condition.of_labels([0, label, 1]))


def test_label_for_a_network_without_classes_is_refused(make_unet_with):
    network = DiffusersNetwork(make_unet_with(num_class_embeds=None))
    assert network.num_classes == 0
    with pytest.raises(ConfigError, match="label 2 was given to a network without classes"):
        network(X, T, Condition.of_labels([-1, 2, -1]))
    assert torch.equal(network(X, T, Condition.of_labels([-1, -1, -1])), network(X, T))


def test_missing_and_superfluous_slots_are_refused(unet, text_unet):
    with pytest.raises(ConfigError, match="needs `tokens`"):
        DiffusersNetwork(text_unet)(X, T)
    with pytest.raises(ConfigError, match="no input for the condition `tokens`"):
        DiffusersNetwork(unet)(X, T, Condition(tokens=torch.zeros(3, 2, 6)))
    with pytest.raises(ConfigError, match="no input for the condition `guidance`"):
        DiffusersNetwork(unet)(X, T, Condition(guidance=torch.ones(3)))
    with pytest.raises(ShapeError, match="tokens are 5 wide, the model expects 6"):
        DiffusersNetwork(text_unet)(X, T, Condition(tokens=torch.zeros(3, 2, 5)))


def test_concatenated_image_follows_x_on_the_channel_axis(make_unet_with):
    model = make_unet_with(in_channels=5)
    image = torch.randn(3, 2, 8, 8)
    direct = model(torch.cat([X, image], 1), T, class_labels=torch.full((3,), 5)).sample
    assert torch.equal(DiffusersNetwork(model)(X, T, Condition(image=image)), direct)
    with pytest.raises(ShapeError, match="takes 5 channels, got 3 of x and 0"):
        DiffusersNetwork(model)(X, T)


def test_predicted_variance_is_dropped(make_unet_with):
    model = make_unet_with(out_channels=6)
    direct = model(X, T, class_labels=torch.full((3,), 5)).sample
    assert torch.equal(DiffusersNetwork(model)(X, T), direct[:, :3])


def test_size_that_the_stride_does_not_divide_is_refused(teacher):
    with pytest.raises(ShapeError, match="7 x 7 px: each side must be a multiple of 2"):
        DiffusersNetwork(teacher)(X[..., :7, :7], T)


def test_dit_does_not_drop_labels_by_itself_in_training(dit):
    network = DiffusersNetwork(dit)
    condition = Condition.of_labels([0, 1, 2])
    expected = network(X, T, condition)
    network.train()
    # diffusers' default drops one label in ten: 60 labels would all survive it with probability 0.002.
    assert all(torch.equal(network(X, T, condition), expected) for _ in range(20))


def test_condition_rows_must_match_the_batch(unet):
    with pytest.raises(ShapeError, match="2 rows for 3 images"):
        DiffusersNetwork(unet)(X, T, Condition.of_labels([0, 1]))


def test_foreign_class_is_refused():
    with pytest.raises(ConfigError, match="`Linear` is not supported"):
        DiffusersNetwork(torch.nn.Linear(2, 2))


def test_model_hash_sees_every_value_name_and_type():
    def layer():
        torch.manual_seed(0)
        return torch.nn.Linear(3, 2)

    base = model_hash(layer())
    assert base == model_hash(layer())
    changed = layer()
    with torch.no_grad():
        changed.bias[0] = torch.nextafter(changed.bias[0], torch.tensor(9.0))
    assert model_hash(changed) != base
    assert model_hash(layer().half()) != base
    assert model_hash(torch.nn.Sequential(layer())) != base


def test_unconditional_condition_reaches_networks_without_classes(make_unet_with):
    model = make_unet_with(num_class_embeds=None)
    assert torch.equal(DiffusersNetwork(model)(X, T, UNCONDITIONAL), model(X, T).sample)
