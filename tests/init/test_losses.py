"""The loss of a sample is what its model says for that sample alone."""

import pytest
import torch

from lorasb_kernels.init.estimation.losses import default_loss, own_losses, per_sample_loss
from tests.families.checks import samples as check_samples
from tests.families.tiny import build as tiny
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


OWN = (
    "WhisperForConditionalGeneration",
    "M2M100ForConditionalGeneration",
    "NllbMoeForConditionalGeneration",
    "BlenderbotForConditionalGeneration",
    "BartForCausalLM",  # does not shift the labels
)


@pytest.mark.parametrize("name", OWN)
def test_models_whose_own_loss_is_taken(name):
    model = tiny(name)
    batch = check_samples(model)
    loss_fn, batches = default_loss(model, [batch])
    assert loss_fn is own_losses
    assert [len(part["labels"]) for part in batches] == [1, 1]
    losses = torch.cat([loss_fn(model, part) for part in batches])
    for index, loss in enumerate(losses):
        own = model(**{key: value[index : index + 1] for key, value in batch.items()}).loss
        torch.testing.assert_close(loss, own)


def test_several_codebooks():
    import transformers as hf

    small = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "ffn_dim": 16}
    decoder = hf.MusicgenDecoderConfig(
        **small,
        vocab_size=16,
        num_codebooks=2,
        max_position_embeddings=32,
        pad_token_id=15,
        bos_token_id=15,
    )
    text = hf.T5Config(d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2, vocab_size=11)
    sound = hf.EncodecConfig(
        hidden_size=8, num_filters=4, codebook_size=16, upsampling_ratios=[2], codebook_dim=8
    )
    decoder.decoder_start_token_id = 15  # where transformers' loss looks for it
    config = hf.MusicgenConfig(
        text_encoder=text.to_dict(), audio_encoder=sound.to_dict(), decoder=decoder.to_dict()
    )
    torch.manual_seed(0)
    model = hf.MusicgenForConditionalGeneration(config).eval()
    batch = {"input_ids": torch.ones(3, 4, dtype=torch.long), "labels": torch.randint(8, (3, 6, 2))}
    loss_fn, batches = default_loss(model, [batch])
    losses = torch.cat([loss_fn(model, part) for part in batches])
    for index, loss in enumerate(losses):
        own = model(**{key: value[index : index + 1] for key, value in batch.items()}).loss
        torch.testing.assert_close(loss, own)


@pytest.mark.parametrize("name", ["LlamaForCausalLM", "T5GemmaForConditionalGeneration"])
def test_the_usual_loss_is_kept_where_it_is_the_models_own(name):
    model = tiny(name)
    batch = check_samples(model)
    loss_fn, batches = default_loss(model, [batch])
    assert loss_fn is per_sample_loss
    assert batches[0] is batch


def test_a_sample_without_labels_has_no_loss_of_the_models_own_either():
    model = tiny("WhisperForConditionalGeneration")
    batch = check_samples(model)
    batch["labels"][1] = -100
    losses = own_losses(model, batch)
    assert losses[0] > 0
    assert losses[1] == 0


def test_a_batch_that_cannot_be_split_is_named():
    model = tiny("WhisperForConditionalGeneration")
    batch = check_samples(model) | {"pieces": torch.zeros(5)}
    with pytest.raises(ValueError, match="pieces has 5 rows in a batch of 2 samples; expected one"):
        own_losses(model, batch)


def test_a_model_without_a_loss_is_named():
    model = tiny("ViTForImageClassification")
    with pytest.raises(ValueError, match="ViTForImageClassification returns no loss for"):
        own_losses(model, {"pixel_values": torch.zeros(1, 3, 32, 32)})


def test_per_sample_loss_falls_back_to_the_models_own():
    model = tiny("WhisperForConditionalGeneration")
    batch = check_samples(model)
    torch.testing.assert_close(per_sample_loss(model, batch), own_losses(model, batch))
