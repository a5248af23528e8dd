"""A GPU that is not there: tensors that say they are on `cuda:0` and are computed on the CPU.

    with SimulatedGPU() as gpu:
        train.main(["--device", "cuda", ...])
    print(gpu.table())          # what was sent to the GPU and what waited for it, by line

Whatever a GPU would refuse is refused here, with the line that did it in the traceback:

* an operation on tensors of two devices (but for single CPU numbers in element-wise operations,
  CPU indices of a GPU tensor, and copies);
* `.numpy()` of a GPU tensor, a generator of the wrong device;
* a collective call with a CPU tensor, as NCCL does;
* with `torch.use_deterministic_algorithms(True)`, what PyTorch computes on a GPU only in a varying
  way (`VARYING`), and every matrix product without CUBLAS_WORKSPACE_CONFIG.

How: `OnGPU` is an empty shell around a CPU tensor. `SimulatedGPU` is a dispatch mode: it sees every
operation below autograd, checks it, runs it on the CPU tensors and wraps what comes out. Python
code is told `cuda:0`; in C++ the shell is on PrivateUse1, PyTorch's place for other people's
devices, for a PyTorch that was built with CUDA asks the driver otherwise. GradScaler, AdamW,
torchvision's nms and roi_align, `torch.save` work as on a GPU. It has random numbers of its own.

Not seen: autocast, DDP's reducer in C++, dtypes that a CUDA kernel lacks, memory, time. Needs
PyTorch's Python backend for PrivateUse1. Importing this file changes `torch.accelerator` for good:
it belongs into a process of its own (`drive.py`).
"""

import collections
import contextlib
import importlib
import os
import sys
import weakref
from pathlib import Path

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map_only

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)


def aten(names: str) -> set[str]:
    """Full names of PyTorch's own operations."""
    return {f"aten::{name}" for name in names.split()}


# Operations that may have CPU tensors of any size beside GPU tensors.
MAY_MIX = aten("_to_copy copy_ _copy_from")
# CPU index tensors are moved by PyTorch itself (their values, not an indexed tensor).
INDEXING = aten("index index_put index_put_ _index_put_impl_")
# Where not even a 0-dim CPU tensor may stand.
STRICT = aten(
    """
    cat stack mm addmm bmm gather index_add index_add_ index_select scatter
    """
)
# With `use_deterministic_algorithms`, these raise on a GPU (alertNotDeterministic).
VARYING = aten(
    """
    grid_sampler_2d_backward upsample_bilinear2d_backward _adaptive_avg_pool2d_backward put_
    histc bincount
    """
)
PRODUCTS = aten("mm addmm bmm baddbmm _addmm_activation")
# The host waits for the result's size or value. `multinomial` checks its chances twice.
WAITS = {
    "aten::_local_scalar_dense": 1,
    "aten::nonzero": 1,
    "aten::masked_select": 1,
    "aten::_unique2": 1,
    "aten::unique_dim": 1,
    "torchvision::nms": 1,
    "aten::multinomial": 2,
    "aten::equal": 1,
    "aten::repeat_interleave": 1,
}
RANDOM = aten(
    """
    randperm multinomial rand randn randint uniform_ normal_ bernoulli_ exponential_ bernoulli
    random_
    """
)


def shell_device() -> torch.device:
    """The device of the shells in C++: PyTorch's place for backends of others.

    Not CUDA's own: a PyTorch that was built with CUDA has autograd ask the driver for
    streams. Python code is told `cuda:0` all the same (`OnGPU.device`).
    """
    if torch._C._get_privateuse1_backend_name() == "privateuseone":
        from torch.utils import backend_registration

        backend_registration._setup_privateuseone_for_python_backend("simulatedgpu")
    return torch.device("simulatedgpu", 0)


SHELL = shell_device()
GPU = ("cuda", SHELL.type)


class OnGPU(torch.Tensor):
    """A CPU tensor, `inner`, in a shell that says it is on `cuda:0`."""

    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, inner: torch.Tensor):
        return torch.Tensor._make_wrapper_subclass(
            cls,
            inner.shape,
            strides=inner.stride(),
            storage_offset=inner.storage_offset(),
            dtype=inner.dtype,
            layout=inner.layout,
            device=SHELL,
            requires_grad=False,
        )

    def __init__(self, inner: torch.Tensor):
        self.inner = inner

    # What Python code is told.
    device = property(lambda self: CUDA)
    is_cuda = property(lambda self: True)

    def get_device(self) -> int:
        return 0

    def tolist(self):
        return self.cpu().tolist()

    def numpy(self, **options):
        raise TypeError("can't convert cuda:0 device type tensor to numpy. Use Tensor.cpu()")

    __array__ = numpy

    def __format__(self, spec: str) -> str:
        return format(self.item() if self.dim() == 0 else repr(self), spec)

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        # Reached where no mode is active: in autograd's threads, after the context.
        return SimulatedGPU.current.run(func, args, kwargs or {})

    def __deepcopy__(self, memo):
        if id(self) not in memo:
            copy = OnGPU(self.inner.detach().clone()).requires_grad_(self.requires_grad)
            if getattr(self, "_is_param", False):
                copy._is_param = True
            memo[id(self)] = copy
        return memo[id(self)]

    def __reduce_ex__(self, protocol):
        # As `torch.save` of a GPU tensor that is read with `map_location="cpu"`.
        return self.inner.detach().__reduce_ex__(protocol)

    def __repr__(self, *, tensor_contents=None):
        return f"OnGPU({self.inner!r})"


# Generators that were made for the GPU.
OF_GPU = weakref.WeakSet()


class SimulatedGenerator(torch._C.Generator):
    """A CPU generator that remembers which device it was made for."""

    def __new__(cls, device="cpu"):
        made = super().__new__(cls, "cpu")
        if torch.device(device).type in GPU:
            OF_GPU.add(made)
        return made

    @classmethod
    def claims(cls, generator: torch._C.Generator) -> str:
        """ "cuda" or "cpu". An operation gets a new Python object: known by its state."""
        state = generator.get_state()
        return "cuda" if any(state.equal(g.get_state()) for g in OF_GPU) else "cpu"


class SimulatedGPU(TorchDispatchMode):
    """In this context there is one GPU.

    Args:
        root: of the project, whose lines are named in the counts.

    Attributes:
        operations, waits: Counter of (line, operation).
        nccl: collective calls refuse CPU tensors.
    """

    current: "SimulatedGPU | None" = None

    def __init__(self, root: str | Path = "."):
        super().__init__()
        self.root = str(Path(root).resolve()) + os.sep
        self.operations, self.waits = collections.Counter(), collections.Counter()
        self.generator = torch._C.Generator("cpu")
        self.copied = collections.Counter()  # line -> bytes over the bus
        self.pinned: dict[int, torch.Tensor] = {}
        self.nccl = True
        self.later: list[str] | None = None

    # ------------------------------------------------------------ the machine around

    def __enter__(self):
        SimulatedGPU.current = self
        cuda = torch.cuda
        one_gpu = dict(
            is_available=lambda: True,
            device_count=lambda: 1,
            current_device=lambda: 0,
            set_device=lambda device: None,
            is_bf16_supported=lambda *a, **k: True,
            is_initialized=lambda: True,
            _lazy_init=lambda: None,
            synchronize=lambda *a: None,
            manual_seed_all=lambda seed: self.generator.manual_seed(seed),
            manual_seed=lambda seed: self.generator.manual_seed(seed),
            get_rng_state=lambda *a: self.generator.get_state(),
            set_rng_state=lambda new_state, *a: self.generator.set_state(new_state),
            get_device_name=lambda *a: "simulated",
            get_device_capability=lambda *a: (9, 0),
            _is_in_bad_fork=lambda: False,
        )
        self.before = [(cuda, name, getattr(cuda, name)) for name in one_gpu]
        self.before.append((torch, "Generator", torch.Generator))
        self.before.append((torch.backends.cudnn, "enabled", torch.backends.cudnn.enabled))
        self.before.append((torch.distributed, "all_reduce", torch.distributed.all_reduce))
        self.before.append((torch.Tensor, "pin_memory", torch.Tensor.pin_memory))
        for name, function in one_gpu.items():
            setattr(cuda, name, function)
            setattr(getattr(torch, SHELL.type), name, function)  # as `fork_rng` asks
        torch.Generator = SimulatedGenerator
        torch.Tensor.pin_memory = lambda tensor, device=None: self.pin(tensor)
        # Else BatchNorm is dispatched to an operation that has no CPU kernel.
        torch.backends.cudnn.enabled = False
        reduce = torch.distributed.all_reduce

        def all_reduce(tensor, *args, **kwargs):
            if self.nccl and not isinstance(tensor, OnGPU):
                raise RuntimeError("No backend type associated with device type cpu (NCCL)")
            return reduce(tensor.inner if isinstance(tensor, OnGPU) else tensor, *args, **kwargs)

        torch.distributed.all_reduce = all_reduce
        # With deterministic algorithms torchvision compiles this for the GPU: the kernel stands in.
        pooling = importlib.import_module("torchvision.ops.roi_align")
        self.before.append((pooling, "_roi_align", pooling._roi_align))
        pooling._roi_align = torch.ops.torchvision.roi_align
        if hasattr(pooling, "is_compile_supported"):
            self.before.append((pooling, "is_compile_supported", pooling.is_compile_supported))
            pooling.is_compile_supported = lambda kind: True
        alert = torch._prims_common.alert_not_deterministic
        self.before.append((torch._prims_common, "alert_not_deterministic", alert))
        torch._prims_common.alert_not_deterministic = lambda name: (
            name == "roi_align_backward_kernel" or alert(name)
        )
        # AdamW and the gradient's norm take their GPU path: all tensors at once.
        for module in ("torch.optim.optimizer", "torch.utils._foreach_utils"):
            found = getattr(sys.modules[module], "_foreach_supported_types", None)
            if found is not None and OnGPU not in found:
                found.append(OnGPU)
        # As FakeTensorMode: a guard for CUDA that does nothing, and `torch.tensor(..,
        # device="cuda")` is made on the CPU and then moved.
        torch._C._ensureCUDADeviceGuardSet()
        # `module.to("cuda")` makes new parameters: a shell cannot take an old one's place.
        self.overwrite = torch.__future__.get_overwrite_module_params_on_conversion()
        torch.__future__.set_overwrite_module_params_on_conversion(True)
        # Autograd cannot take an error in the middle (it would end the process): it comes after.
        backward, self.later = torch.autograd.backward, None
        self.before.append((torch.autograd, "backward", backward))

        def careful(*args, **kwargs):
            self.later = []
            backward(*args, **kwargs)
            errors, self.later = self.later, None
            if errors:
                raise RuntimeError(f"in the backward pass: {errors[0]}")

        torch.autograd.backward = careful
        self.lift = torch._C._only_lift_cpu_tensors()
        torch._C._set_only_lift_cpu_tensors(True)
        return super().__enter__()

    def __exit__(self, *error):
        super().__exit__(*error)
        torch._C._set_only_lift_cpu_tensors(self.lift)
        torch.__future__.set_overwrite_module_params_on_conversion(self.overwrite)
        for owner, name, value in self.before:
            setattr(owner, name, value)

    def pin(self, tensor: torch.Tensor) -> torch.Tensor:
        """`Tensor.pin_memory`: a copy, whose place is remembered."""
        assert not isinstance(tensor, OnGPU), "cannot pin 'torch.cuda.FloatTensor'"
        copy = tensor.clone()
        # Kept, so that no other tensor ever gets its place.
        self.pinned[copy.untyped_storage().data_ptr()] = copy
        return copy

    def is_pinned(self, tensor: torch.Tensor) -> bool:
        on_gpu = isinstance(tensor, OnGPU)
        return not on_gpu and tensor.untyped_storage().data_ptr() in self.pinned

    # -------------------------------------------------------------------- operations

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return self.run(func, args, kwargs or {})

    def run(self, func, args: tuple, kwargs: dict):
        name = func._schema.name
        flat, _ = tree_flatten((args, kwargs))
        fakes = [x for x in flat if isinstance(x, OnGPU)]
        plain = [x for x in flat if isinstance(x, torch.Tensor) and not isinstance(x, OnGPU)]
        device = kwargs.get("device")
        target = None if device is None else torch.device(device).type
        on_gpu = bool(fakes) if target is None else target in GPU
        if fakes:
            self.check(name, args, plain)
        if on_gpu or fakes:
            self.count(func, name, args, kwargs, fakes, plain, target)
        self.check_generator(name, kwargs, on_gpu)
        if on_gpu and torch.are_deterministic_algorithms_enabled():
            if name in VARYING:
                self.refuse(f"{name} does not have a deterministic implementation")
            if name in PRODUCTS and "CUBLAS_WORKSPACE_CONFIG" not in os.environ:
                self.refuse(f"{name}: deterministic only with CUBLAS_WORKSPACE_CONFIG=:4096:8")
        if target is not None:
            kwargs = dict(kwargs, device=CPU)
        inner = tree_map_only(OnGPU, lambda x: x.inner, (args, kwargs))
        draws = on_gpu and name in RANDOM and kwargs.get("generator") is None
        with torch._C._DisableTorchDispatch(), self.own_numbers(draws):
            result = func(*inner[0], **inner[1])
        # In-place and `out=` operations give back the shell that they were given.
        if isinstance(result, torch.Tensor) and on_gpu:
            for given in fakes:
                if given.inner is result:
                    return given
        if not on_gpu:
            return result
        return tree_map_only(torch.Tensor, OnGPU, result)

    @contextlib.contextmanager
    def own_numbers(self, draws: bool):
        """The GPU draws from a generator of its own, not from the CPU's."""
        if not draws:
            yield
            return
        usual, before = torch.default_generator, torch.default_generator.get_state()
        usual.set_state(self.generator.get_state())
        yield
        self.generator.set_state(usual.get_state())
        usual.set_state(before)

    def check(self, name: str, args: tuple, plain: list) -> None:
        """Raise where a GPU tensor meets a CPU tensor that it must not meet."""
        if name in MAY_MIX:
            return
        if name in INDEXING:
            others = [args[0], *args[2:3]]
            plain = [x for x in others if isinstance(x, torch.Tensor) and type(x) is not OnGPU]
            if isinstance(args[0], OnGPU):
                plain = [x for x in plain if x.dim()]
            elif name != "aten::index":
                plain = [args[0]]
            else:
                # A CPU tensor cannot be indexed by a GPU one.
                plain = [args[0]]
            if plain:
                self.refuse(
                    f"{name}: indices should be either on cpu or on the same device as the "
                    "indexed tensor"
                )
            return
        if name not in STRICT:
            plain = [x for x in plain if x.dim()]
        if plain:
            self.refuse(
                "Expected all tensors to be on the same device, but found at least two "
                f"devices, cuda:0 and cpu! ({name}, CPU tensor of {tuple(plain[0].shape)})"
            )

    def refuse(self, why: str) -> None:
        if self.later is None:
            raise RuntimeError(why)
        self.later.append(why)

    def check_generator(self, name: str, kwargs: dict, on_gpu: bool) -> None:
        generator, wanted = kwargs.get("generator"), "cuda" if on_gpu else "cpu"
        if generator is not None and SimulatedGenerator.claims(generator) != wanted:
            found = SimulatedGenerator.claims(generator)
            self.refuse(
                f"Expected a '{wanted}' device type for generator but found '{found}' ({name})"
            )

    # ------------------------------------------------------------------------ counts

    def line(self) -> str:
        """The innermost line of the project, or what the thread is doing."""
        frame = sys._getframe(2)
        inside = ""
        while frame:
            path = frame.f_code.co_filename
            if path.startswith(self.root) and "simulated_gpu" not in path:
                return f"{path.removeprefix(self.root)}:{frame.f_lineno}{inside}"
            if "torchvision" in path and not inside:
                inside = f" > {Path(path).name}:{frame.f_lineno}"
            frame = frame.f_back
        return "backward" + inside

    def count(self, func, name, args, kwargs, fakes, plain, target) -> None:
        where = self.line()
        self.operations[where, name] += 1
        waits = WAITS.get(name, 0)
        # A single number put where a mask says is `masked_fill_`, which does not wait.
        if name in INDEXING and (name == "aten::index" or args[2].dim()):
            waits += sum(
                x is not None and x.dtype in (torch.bool, torch.uint8)
                for x in args[1]
                if x is None or isinstance(x, torch.Tensor)
            )
        # A copy between the CPU's usual memory and the GPU, either way, waits.
        source = args[1] if name == "aten::copy_" else args[0] if args else None
        if name == "aten::_to_copy" and target is not None:
            crossing = isinstance(source, OnGPU) != (target in GPU)
        elif name == "aten::copy_":
            crossing = isinstance(source, OnGPU) != isinstance(args[0], OnGPU)
        else:
            crossing = False
        if crossing:
            kind = "to host" if isinstance(source, OnGPU) else "to GPU"
            name = f"{name} {kind}"
            self.copied[where, kind] += source.numel() * source.element_size()
            # From pinned memory the GPU fetches by itself, if the host asks it to.
            waits += not (kwargs.get("non_blocking", False) and self.is_pinned(source))
        if waits:
            self.waits[where, name] += waits

    def table(self, top: int = 20) -> str:
        """The most frequent operations and waits, by line."""
        lines = []
        for title, counts in (("operations", self.operations), ("waits", self.waits)):
            by_line = collections.Counter()
            kinds = collections.defaultdict(collections.Counter)
            for (where, name), number in counts.items():
                by_line[where] += number
                kinds[where][name.removeprefix("aten::")] += number
            lines.append(f"{sum(counts.values())} {title}")
            for where, number in by_line.most_common(top):
                said = ", ".join(f"{n} {k}" for n, k in kinds[where].most_common(4))
                lines.append(f"  {number:6}  {where:60}  {said}")
        return "\n".join(lines)
