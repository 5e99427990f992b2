"""The loss of a sample is what its model says for that sample alone."""

import pytest
import torch

from lorasb_kernels.init.estimation.losses import per_sample_loss
from tests.init.models import FAMILIES, VOCABULARY, padded, samples


def assert_is_the_models_own(model, rows, batch):
    losses = per_sample_loss(model, batch)
    assert losses.shape == (len(rows),)
    for index, row in enumerate(rows):
        torch.testing.assert_close(losses[index], model(**padded([row])).loss, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("family", FAMILIES)
def test_each_family(family):
    model = FAMILIES[family]().eval()
    rows = samples(4, classes=3 if family == "roberta" else None)
    assert_is_the_models_own(model, rows, padded(rows, extra=2))


def bert(kind: str, **settings):
    import transformers

    config = transformers.BertConfig(
        vocab_size=VOCABULARY,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        **settings,
    )
    return getattr(transformers, f"BertFor{kind}")(config).eval()


@pytest.mark.parametrize("kind", ["MaskedLM", "TokenClassification"])
def test_unshifted_token_labels(kind):
    model = bert(kind, num_labels=VOCABULARY)
    rows = samples(3)
    assert_is_the_models_own(model, rows, padded(rows))


@pytest.mark.parametrize(
    ("labels", "settings"),
    [
        (torch.tensor([0, 2, 1]), {"num_labels": 3}),
        (torch.tensor([0.5, -1.0, 2.0]), {"num_labels": 1}),
        (torch.tensor([1, 4, 3]), {"num_labels": 1}),
        (torch.rand(3, 2), {"num_labels": 2, "problem_type": "regression"}),
        (torch.tensor([[1.0, 0, 1], [0, 0, 0], [1, 1, 1]]), {"num_labels": 3}),
    ],
    ids=["classes", "regression", "integer regression", "two targets", "multi-label"],
)
def test_sequence_labels(labels, settings):
    model = bert("SequenceClassification", **settings)
    batch = padded(samples(3)) | {"labels": labels}
    losses = per_sample_loss(model, batch)
    assert model.config.problem_type == settings.get("problem_type")
    for index, label in enumerate(labels):
        one = {key: value[index : index + 1] for key, value in batch.items()}
        one["labels"] = label[None].float() if settings["num_labels"] == 1 else label[None]
        torch.testing.assert_close(losses[index], model(**one).loss, rtol=1e-5, atol=1e-6)


def test_sample_without_labelled_tokens_has_no_loss():
    model = FAMILIES["llama"]().eval()
    rows = samples(3)
    rows[1]["labels"].fill_(-100)
    losses = per_sample_loss(model, padded(rows))
    assert losses[1] == 0
    assert (losses[[0, 2]] > 0).all()


def test_logits_are_computed_where_there_are_labels_only():
    model = FAMILIES["llama"]().eval()
    shapes = []
    model.lm_head.register_forward_hook(lambda m, args, output: shapes.append(output.shape))
    batch = padded(samples(2))
    per_sample_loss(model, batch)
    labelled = (batch["labels"][:, 1:] != -100).any(0).sum()
    assert shapes == [(2, labelled, VOCABULARY)]
    assert labelled < batch["labels"].shape[1] - 1
