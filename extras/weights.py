"""Weights in files, and weights in bfloat16.

policy.load reads an ordinary checkpoint folder. `load` here also reads adapter folders, and it
tells you what is wrong with a folder that cannot be read. `save` writes an ordinary Hugging Face
folder or, with LoRA, an adapter in PEFT's format, which peft.PeftModel.from_pretrained reads.
MasterAdamW trains weights in bfloat16. At the paper's learning rate plain AdamW would not change
them at all.
"""

import json
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch.utils.checkpoint import checkpoint

import grpo
from extras.attention import batch_windows
from policy import SYSTEM_PROMPT_FILE, Policy, PolicyError, read_system_prompt
from policy import load as load_plain

ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
ADAPTER_PREFIX = "base_model.model."        # PEFT puts it before every tensor's name
NOT_PLAIN = ("use_dora", "use_rslora", "modules_to_save", "rank_pattern", "alpha_pattern")


# --- loading --------------------------------------------------------------------------------------


def load(name: str, device: str = "cpu", dtype: torch.dtype | str = torch.float32) -> Policy:
    """Loads a checkpoint folder, a model of the Hugging Face hub, or an adapter and its base model.

    dtype "auto" keeps the checkpoint's own. Raises PolicyError if the folder is missing or
    half-written, if the model is of another kind, or if an adapter does not fit its base model.
    """
    check_name(name)
    if adapter := adapter_config(name):
        return load_adapter(Path(name), adapter["base_model_name_or_path"], device, dtype)
    try:
        policy = load_plain(name, dtype=dtype)
    except PolicyError:
        raise
    except Exception as error:      # each library raises errors of its own, all for the same reason
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise PolicyError(f"cannot load the model {name}: {reason}\n"
                          "check that the folder is complete (config.json, *.safetensors, "
                          "tokenizer.json, preprocessor_config.json) or that the hub can be "
                          "reached") from error
    batch_windows(policy.model)
    policy.model.to(device)         # outside of `try`: the folder is not to blame for the device
    policy.barred = policy.barred.to(device)
    return policy


def load_adapter(folder: Path, base: str, device: str, dtype: torch.dtype | str) -> Policy:
    """Loads the base model and puts the adapter in `folder` on it."""
    try:
        policy = load(base, device, dtype)
    except PolicyError as error:
        raise PolicyError(f"{folder} is an adapter, and its base model is not available: {error}\n"
                          "if the model was moved, correct base_model_name_or_path in "
                          f"{folder / ADAPTER_CONFIG}") from error
    read_adapter(policy, folder)
    policy.system_prompt = read_system_prompt(str(folder))
    return policy


def check_name(name: str) -> None:
    """Raises PolicyError for a folder that does not exist. A hub name (owner/model) passes."""
    looks_local = name.startswith((".", "/", "~")) or name.count("/") != 1
    if looks_local and not Path(name).is_dir():
        raise PolicyError(f"model folder {name} does not exist; give a folder with config.json and "
                          "model.safetensors, or a hub name such as Qwen/Qwen2.5-VL-3B-Instruct")


# --- adapters -------------------------------------------------------------------------------------


def adapter_config(name: str) -> dict | None:
    """The content of an adapter folder's adapter_config.json; None for other folders and hub names.

    Raises PolicyError if the file cannot be read.
    """
    file = Path(name) / ADAPTER_CONFIG
    if not file.is_file():
        return None
    try:
        config = json.loads(file.read_text())
        return config | {"base_model_name_or_path": str(config["base_model_name_or_path"]),
                         "r": int(config["r"]), "lora_alpha": float(config["lora_alpha"])}
    except (ValueError, KeyError, TypeError) as error:
        raise PolicyError(f"{file} cannot be read ({type(error).__name__}: {error}); copy the "
                          "folder again") from None


def read_adapter(policy: Policy, folder: Path) -> None:
    """Puts a saved adapter on the policy and freezes the rest.

    It may be one of ours or a plain LoRA of PEFT. Raises PolicyError if it does not fit.
    """
    config = adapter_config(str(folder))
    try:
        tensors = load_file(folder / ADAPTER_WEIGHTS)
    except Exception as error:      # whether the file is missing or cut off: copy it again
        raise PolicyError(f"{folder / ADAPTER_WEIGHTS} cannot be read ({error}); copy the folder "
                          "again") from error
    strange = [key for key in NOT_PLAIN if config.get(key)]
    if strange or config.get("peft_type") != "LORA":
        raise PolicyError(f"the adapter {folder} is no plain LoRA "
                          f"({', '.join(strange) or config.get('peft_type')}); merge it into its "
                          "model with peft's merge_and_unload and load that folder")
    policy.model.requires_grad_(False)
    try:
        fill_adapters(policy, tensors, config["r"], config["lora_alpha"])
    except (ValueError, KeyError, AttributeError) as error:
        raise PolicyError(f"the adapter {folder} does not fit its base model {policy.name}: "
                          f"{error}; name the right one as base_model_name_or_path in "
                          f"{folder / ADAPTER_CONFIG}") from error


def fill_adapters(policy: Policy, tensors: dict[str, torch.Tensor], rank: int,
                  alpha: float) -> None:
    """Makes an adapter of each pair lora_A, lora_B. Takes what it uses out of `tensors`.

    Raises ValueError, KeyError or AttributeError if a tensor is missing, has another shape, or
    belongs to no layer of the policy.
    """
    ending = ".lora_A.weight"
    pairs = {key.removesuffix(ending) for key in tensors if key.endswith(ending)}
    for key in sorted(pairs):
        adapter = policy.wrap(key.removeprefix(ADAPTER_PREFIX), rank, alpha)
        for letter in "AB":
            saved, own = tensors.pop(f"{key}.lora_{letter}.weight"), getattr(adapter, letter)
            if saved.shape != own.shape:
                raise ValueError(f"{key}.lora_{letter} is {tuple(saved.shape)} there, "
                                 f"{tuple(own.shape)} here")
            own.data.copy_(saved)
    if tensors or not pairs:
        raise ValueError(f"no place for {min(tensors)}" if tensors else "it holds no adapter")


def save_adapter(policy: Policy, folder: Path) -> None:
    """Writes adapter_config.json and adapter_model.safetensors in PEFT's format."""
    folder.mkdir(parents=True, exist_ok=True)
    adapter = next(iter(policy.adapters.values()))
    targets = sorted({name.split(".")[-1] for name in policy.adapters})
    base = str(Path(policy.name).resolve()) if Path(policy.name).is_dir() else policy.name
    (folder / ADAPTER_CONFIG).write_text(json.dumps({
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": base,
        "r": adapter.rank, "lora_alpha": adapter.alpha, "lora_dropout": 0.0, "bias": "none",
        "inference_mode": True,
        # a pattern and not a list of names, because the vision tower has layers of the same names
        "target_modules": rf".*\.language_model\..*\.({'|'.join(targets)})"}, indent=1))
    tensors = {f"{ADAPTER_PREFIX}{name}.lora_{letter}.weight":
               getattr(adapter, letter).detach().cpu().contiguous()
               for name, adapter in policy.adapters.items() for letter in "AB"}
    save_file(tensors, folder / ADAPTER_WEIGHTS, metadata={"format": "pt"})


# --- saving ---------------------------------------------------------------------------------------


def save(policy: Policy, folder: Path | str, write: bool = True) -> None:
    """Writes an ordinary Hugging Face folder, or with LoRA an adapter, and the system prompt.

    write: give False in all processes of a run but the first. Then the folder is made and stays
    empty.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    if not write:
        return
    if policy.adapters:
        save_adapter(policy, folder)
    else:       # with several GPUs state_dict() would hold only this process's parts of the weights
        weights = dict(policy.model.named_parameters())
        policy.model.save_pretrained(folder, state_dict=weights)
    policy.tokenizer.save_pretrained(folder)
    policy.image_processor.save_pretrained(folder)
    (folder / SYSTEM_PROMPT_FILE).write_text(policy.system_prompt)


def save_merged(model: str | None, target: str) -> None:
    """--save-merged: writes an adapter folder and its base model as one ordinary model folder.

    The weights keep the precision of the base model. Raises PolicyError if `model` is no adapter
    folder or `target` exists.
    """
    if not model or not adapter_config(model):
        raise PolicyError("--save-merged needs --model DIR with adapter_config.json in DIR, such "
                          "as a LoRA run's model/")
    if Path(target).exists():
        raise PolicyError(f"--save-merged {target} exists; nothing was overwritten. Name a new "
                          "folder or remove it")
    policy = load(model, dtype="auto")
    merge_lora(policy)
    save(policy, target)
    print(f"{target}: {model} merged into {policy.name}")


def merge_lora(policy: Policy) -> None:
    """Adds every adapter to its layer. The model is then an ordinary one and computes the same."""
    for name, adapter in policy.adapters.items():
        parent, _, child = name.rpartition(".")
        setattr(policy.model.get_submodule(parent), child, adapter.merged())
    policy.adapters = {}


# --- memory ---------------------------------------------------------------------------------------


@contextmanager
def checkpointing(policy: Policy):
    """Gradient checkpointing: backward keeps each layer's input and computes the rest again.

    This costs a third more arithmetic (one forward pass; backward costs two) and saves most of the
    memory. transformers' own switch does nothing in eval mode, where this model is, and has changed
    its name.
    """
    model = policy.model.model
    layers = [*model.language_model.layers, *model.visual.blocks]
    for layer in layers:        # an attribute of the object is found before its class's method
        layer.forward = partial(checkpoint, layer.forward, use_reentrant=False,
                                preserve_rng_state=False)
    try:
        yield
    finally:
        for layer in layers:
            del layer.forward


# --- master weights -------------------------------------------------------------------------------


class MasterAdamW:
    """AdamW (arXiv 1711.05101, without weight decay) with a float32 master of each bfloat16 weight.

    A bfloat16 number has 8 significant bits: adding less than 0.00006 to 0.02 changes nothing.
    AdamW moves a weight by about the learning rate in each step, and at 1e-6 that is always too
    little. The master adds these small changes up, and the model gets it rounded. `step` takes one
    weight at a time, so that there is never a second set of gradients in memory. A weight takes
    2 + 2 bytes (weight and gradient) and 12 bytes here.
    """

    def __init__(self, weights, lr: float, betas: tuple[float, float] = (0.9, 0.99),
                 eps: float = 1e-8):
        self.weights, self.betas, self.eps, self.steps = list(weights), betas, eps, 0
        self.param_groups = [{"lr": lr}]
        self.masters = [w.detach().float() for w in self.weights]
        self.means = [torch.zeros_like(m) for m in self.masters]
        self.squares = [torch.zeros_like(m) for m in self.masters]

    @torch.no_grad()
    def step(self) -> None:
        self.steps += 1
        (b1, b2), lr = self.betas, self.param_groups[0]["lr"]
        for weight, master, mean, square in zip(self.weights, self.masters, self.means,
                                                self.squares, strict=True):
            if weight.grad is None:
                continue
            gradient = weight.grad.float()
            mean.lerp_(gradient, 1 - b1)
            square.mul_(b2).addcmul_(gradient, gradient, value=1 - b2)
            scale = (square / (1 - b2 ** self.steps)).sqrt_().add_(self.eps)
            master.addcdiv_(mean, scale, value=-lr / (1 - b1 ** self.steps))
            weight.copy_(master)            # rounded to nearest

    def zero_grad(self, set_to_none: bool = True) -> None:
        for weight in self.weights:
            weight.grad = None

    def state_dict(self) -> dict:
        return {"steps": self.steps, "masters": self.masters, "means": self.means,
                "squares": self.squares}

    @torch.no_grad()
    def load_state_dict(self, state: dict) -> None:
        self.steps = state["steps"]
        for name in ("masters", "means", "squares"):
            for own, saved in zip(getattr(self, name), state[name], strict=True):
                own.copy_(saved)


class Optimizer(grpo.Optimizer):
    """grpo.Optimizer for weights in bfloat16: AdamW steps their masters."""

    def make(self, lr: float) -> MasterAdamW:
        return MasterAdamW(self.weights, lr)
