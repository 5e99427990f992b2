"""What the LoRA-SB paper (arXiv:2411.19557) proves, checked on matrices and on a model."""

import copy

import pytest
import torch
import transformers as hf

from lorasb_kernels import LoRASBConfig, LoRASBLinear, SignMatrix, adapt
from lorasb_kernels.functional import lorasb_linear
from lorasb_kernels.init.methods import lora_sb
from lorasb_kernels.targets import adapted_layers
from lorasb_kernels.train.demo.assets import minilm

M, n, m, r = 11, 20, 14, 5


@pytest.fixture
def problem():
    torch.manual_seed(0)
    normal = torch.distributions.Normal(0.0, 1.0)
    return {
        "x": normal.sample((M, n)).double(),
        "weight": normal.sample((m, n)).double(),
        "lora_A": normal.sample((r, n)).double(),
        "lora_R": normal.sample((r, r)).double().requires_grad_(),
        "lora_B": normal.sample((m, r)).double(),
        "target": normal.sample((M, m)).double(),
    }


def loss_of(problem, weight=None, scaling=1.0):
    arguments = {key: value for key, value in problem.items() if key != "target"}
    if weight is not None:
        y = arguments["x"] @ weight.T
    else:
        y = lorasb_linear(**arguments, scaling=scaling)
    return (y - problem["target"]).square().sum()


def full_gradient(problem, scaling):
    """∂L/∂W of the layer at its adapted weight."""
    delta = scaling * problem["lora_B"] @ problem["lora_R"].detach() @ problem["lora_A"]
    weight = (problem["weight"] + delta).requires_grad_()
    (gradient,) = torch.autograd.grad(loss_of(problem, weight), weight)
    return gradient


def layer_of(problem, scaling, optimal_gradient=True):
    """The problem's layer as the project's module, in float64."""
    linear = torch.nn.Linear(n, m, bias=False, dtype=torch.float64)
    linear.weight.data.copy_(problem["weight"])
    layer = LoRASBLinear.from_linear(linear, r, scaling=scaling, optimal_gradient=optimal_gradient)
    layer.double()
    layer.set_adapter(problem["lora_A"], problem["lora_R"].detach(), problem["lora_B"])
    return layer


def core_gradient(problem, scaling):
    """The gradient that the module gives R in the problem's loss, with `optimal_gradient`."""
    layer = layer_of(problem, scaling)
    loss = (layer(problem["x"]) - problem["target"]).square().sum()
    (gradient,) = torch.autograd.grad(loss, layer.lora_R)
    return gradient


@pytest.mark.parametrize("scaling", [0.25, 1.0, 4.0])
def test_lemma_2_the_gradient_of_the_core_is_the_projected_full_gradient(problem, scaling):
    (gradient,) = torch.autograd.grad(loss_of(problem, scaling=scaling), problem["lora_R"])
    g = full_gradient(problem, scaling)
    expected = scaling * problem["lora_B"].T @ g @ problem["lora_A"].T
    torch.testing.assert_close(gradient, expected)


@pytest.mark.parametrize("scaling", [0.25, 1.0, 4.0])
def test_theorem_3_no_core_gradient_comes_closer_to_the_full_gradient(problem, scaling):
    A, B = problem["lora_A"], problem["lora_B"]
    g = full_gradient(problem, scaling)
    found = core_gradient(problem, scaling)

    def distance(candidate):
        return (scaling * B @ candidate @ A - g).norm()

    # The least-squares solution over all r×r matrices, by Kronecker products.
    design = scaling * torch.kron(B, A.T.contiguous())
    solution = torch.linalg.lstsq(design, g.reshape(-1, 1)).solution.view(r, r)
    torch.testing.assert_close(found, solution, rtol=1e-9, atol=1e-9)
    for size in (1e-3, 1.0):
        assert distance(found + size * torch.randn(r, r).double()) > distance(found)


@pytest.mark.parametrize("scaling", [0.25, 1.0, 4.0])
def test_theorem_4_a_small_step_lowers_the_loss_as_predicted(problem, scaling):
    R = problem["lora_R"]
    loss = loss_of(problem, scaling=scaling)
    (gradient,) = torch.autograd.grad(loss, R)
    step = core_gradient(problem, scaling)
    predicted = (gradient * step).sum()
    assert predicted > 0
    eta = 1e-7
    with torch.no_grad():
        change = loss_of({**problem, "lora_R": R - eta * step}, scaling=scaling) - loss
    torch.testing.assert_close(change, -eta * predicted, rtol=1e-4, atol=0)


def test_theorem_5_the_equivalent_gradient_does_not_depend_on_s(problem):
    """At one adapted weight, s·B·R·A the same, the step of W that the core's gradient stands for
    is the same; under other optimizers, see test_optimal.py."""
    A, B, R = problem["lora_A"], problem["lora_B"], problem["lora_R"].detach()
    equivalent = [s * B @ core_gradient({**problem, "lora_R": R / s}, s) @ A for s in (0.25, 1, 4)]
    assert equivalent[1].norm() > 1
    torch.testing.assert_close(equivalent[0], equivalent[1])
    torch.testing.assert_close(equivalent[2], equivalent[1])


@pytest.mark.parametrize("scaling", [0.25, 1.0, 4.0])
def test_theorem_6_the_first_step_is_the_best_rank_r_one(scaling):
    """With the factors of `lora_sb`, the first update and a gradient step of R from 0 are each
    the best rank-r approximation of the full step, and the optimal gradient is the plain one."""
    eta = 1e-2
    signs = torch.randint(0, 2, (m, n), generator=torch.Generator().manual_seed(0)) * 2.0 - 1
    U, S, Vt = torch.linalg.svd(-eta * signs.double())
    best = (U[:, :r] * S[:r]) @ Vt[:r]
    (adapter,) = lora_sb([SignMatrix.from_dense(signs)], r, eta, scaling, torch.Generator())
    torch.testing.assert_close(delta_of(adapter, scaling), best, rtol=1e-3, atol=1e-5)

    # The gradient of this loss in W is `signs`.
    layer = LoRASBLinear.from_linear(
        torch.nn.Linear(n, m, bias=False), r, scaling=scaling, optimal_gradient=True
    )
    layer.set_adapter(adapter.lora_A, torch.zeros(r, r), adapter.lora_B)
    (layer(torch.eye(n)) * signs.T).sum().backward()
    with torch.no_grad():
        layer.lora_R -= eta * layer.lora_R.grad
    torch.testing.assert_close(layer.get_delta_weight().double(), best, rtol=1e-3, atol=1e-5)
    plain = scaling * adapter.lora_B.T @ signs @ adapter.lora_A.T
    torch.testing.assert_close(layer.lora_R.grad * scaling**2, plain, rtol=1e-4, atol=1e-4)


def delta_of(adapter, scaling):
    return scaling * (adapter.lora_B @ adapter.lora_R @ adapter.lora_A).double()


@pytest.fixture(scope="module")
def encoder():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = hf.AutoModelForSequenceClassification.from_pretrained(minilm(), num_labels=2)
    return model.double().eval()


def headline_batch(count=4):
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(1000, 20000, (count, 9), generator=generator)
    labels = torch.randint(0, 2, (count,), generator=generator)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}


def test_theorem_5_on_a_model_the_trained_function_does_not_depend_on_s(encoder):
    """SGD with the optimal gradient follows the same path for every s, whatever A and B."""
    batch, outputs = headline_batch(), []
    for scaling in (0.25, 1.0, 4.0):
        config = LoRASBConfig(
            8,
            ("query", "value"),
            "orthogonal",
            scaling=scaling,
            optimal_gradient=True,
            seed=1,
        )
        model = adapt(copy.deepcopy(encoder), config, progress=False)
        for layer in adapted_layers(model).values():
            skewed = torch.linspace(0.5, 2.0, 8, dtype=torch.float64)
            layer.set_adapter(layer.lora_A * skewed[:, None], layer.lora_R, layer.lora_B * skewed)
        cores = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.SGD(cores, lr=50.0)
        for _ in range(3):
            optimizer.zero_grad()
            model(**batch).loss.backward()
            optimizer.step()
        outputs.append(model(**batch).logits.detach())
    torch.testing.assert_close(outputs[0], outputs[1], rtol=1e-8, atol=1e-10)
    torch.testing.assert_close(outputs[2], outputs[1], rtol=1e-8, atol=1e-10)
    assert (outputs[1] - encoder(**batch).logits).abs().max() > 1e-3


def test_theorems_3_and_4_on_a_model(encoder):
    """The r×r gradient of every layer is s·Bᵀ g Aᵀ of the full one, and a step lowers the loss."""
    batch = headline_batch()
    model = copy.deepcopy(encoder)
    model(**batch).loss.backward()
    full = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    config = LoRASBConfig(8, init="orthogonal", scaling=0.5)
    model = adapt(copy.deepcopy(encoder), config, progress=False)
    loss = model(**batch).loss
    loss.backward()
    for name, layer in adapted_layers(model).items():
        g = full[f"{name}.weight"]
        A, B = layer.lora_A, layer.lora_B
        torch.testing.assert_close(layer.lora_R.grad, 0.5 * B.T @ g @ A.T, rtol=1e-7, atol=1e-9)
    predicted = sum(p.grad.square().sum() for p in model.parameters() if p.requires_grad)
    eta = 1e-6
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p -= eta * p.grad
        change = model(**batch).loss - loss
    torch.testing.assert_close(change, -eta * predicted, rtol=1e-3, atol=0)
