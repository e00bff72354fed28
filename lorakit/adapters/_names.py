"""The names of an adapter's tensors: what each belongs to, and whether the settings mean it."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from lorakit.adapters._method import Method, SiteSettings
from lorakit.adapters._peft import PeftConfig, shown
from lorakit.errors import BadInput
from lorakit.model.patterns import ending
from lorakit.storage.redact import printable

# PEFT's copy of a whole embedding of the base, beside its update.
BASE_COPY = ".base_layer.weight"


@dataclass
class Names:
    """A file's names, sorted out by their ends; nothing is ever replaced inside a name.

    `keys` are the file's names by ours, which are module paths and `Layer.tensors`' names.
    """

    keys: dict[str, str] = field(default_factory=dict)
    parts: dict[str, list[str]] = field(default_factory=dict)  # adapted module: its tensors
    copies: dict[str, list[str]] = field(default_factory=dict)  # module saved whole: its tensors
    base_copies: dict[str, str] = field(default_factory=dict)  # module: the file's name
    stray: list[str] = field(default_factory=list)

    @classmethod
    def of(cls, method: type[Method], keys: Iterable[str]) -> "Names":
        """Sort out the names of a file."""
        names = cls()
        known = frozenset().union(*method.PARTS)
        for key in sorted(keys):
            name = key.removeprefix(method.PREFIX)
            if name.endswith(".lora_magnitude_vector.weight"):  # as older files of PEFT have it
                name = name.removesuffix(".weight")
            module, part = _split(name, known)
            if not key.startswith(method.PREFIX):
                names.stray.append(key)
            elif part:
                names.parts.setdefault(module, []).append(part)
                names.keys[name] = key
            elif name.endswith(BASE_COPY):
                names.base_copies[name.removesuffix(BASE_COPY)] = key
            elif name.endswith((".weight", ".bias")):
                module, _, leaf = name.rpartition(".")
                names.copies.setdefault(module, []).append(leaf)
                names.keys[name] = key
            else:
                names.stray.append(key)
        return names

    def check(self, method: type[Method], config: PeftConfig, where: str) -> None:
        """Compare the names with what the settings mean, as far as that goes without the base.

        Raises:
            BadInput: `adapter.missing-tensor` or `adapter.unexpected-tensor`.
        """
        if not self.parts:
            found = [*self.stray, *self.keys.values()]
            raise missing_tensors(_first_expected(method, config), where, found)
        missing, extra = [], list(self.stray)
        for module, parts in self.parts.items():
            whole = max(method.PARTS, key=lambda one: (len(one & set(parts)), -len(one)))
            missing += [_join(method.PREFIX + module, part) for part in sorted(whole - set(parts))]
            extra += [self.keys[_join(module, part)] for part in parts if part not in whole]
        extra += [key for module, key in self.base_copies.items() if module not in self.parts]
        if issubclass(method.Settings, SiteSettings):
            missing += self._unmatched(config)
            extra += self._not_meant(config)
        if missing:
            raise missing_tensors(missing, where, extra)
        if extra:
            raise unexpected_tensors(extra, where)

    def _unmatched(self, config: PeftConfig) -> list[str]:
        """Return the entries of lists that no tensor belongs to; a pattern is judged elsewhere.

        Raises:
            BadInput: `adapter.bad-setting` when there are no targets.
        """
        targets, modules = config.values.get("target_modules"), [*self.parts, *self.copies]
        if not targets:
            raise config.wrong("target_modules", f"expected names, found {shown(targets)}")
        entries = [] if isinstance(targets, str) else config.names("target_modules")
        excluded = config.named("exclude_modules", entries)
        wanted = [(entry, modules) for entry in entries if entry not in excluded]
        wanted += [(entry, list(self.copies)) for entry in config.names("modules_to_save")]
        return [f"any of `{printable(entry)}`" for entry, of in wanted if not ending(entry, of)]

    def _not_meant(self, config: PeftConfig) -> list[str]:
        """Return the tensors of modules that the settings do not name."""
        if config.flag("ensure_weight_tying"):
            return []  # the other end of a tie is not named; the base's sites will tell
        adapted, copied = list(self.parts), list(self.copies)
        if config.values.get("target_modules") != "all-linear":
            meant = config.targeted(adapted)
            adapted = [module for module in adapted if module not in meant]
        else:
            adapted = []
        whole = config.names("modules_to_save")
        copied = [module for module in copied if not module.endswith(whole)]
        return [
            self.keys[_join(module, part)]
            for modules, tensors in ((adapted, self.parts), (copied, self.copies))
            for module in modules
            for part in tensors[module]
        ]


def missing_tensors(missing: Sequence[str], where: str, found: Sequence[str] = ()) -> BadInput:
    """Return the error about tensors that are missing; `found` are names that belong to nothing."""
    instead = f"; the file has {printable(found[0], 200)}" if found else ""
    count = f"; {len(missing)} are missing" if len(missing) > 1 else ""
    message = f"missing tensor: {printable(missing[0], 200)}{count}{instead}"
    help = "the file was not written whole, or its settings were changed; save the adapter again"
    return BadInput("adapter.missing-tensor", message, where=where, help=help)


def unexpected_tensors(extra: Sequence[str], where: str) -> BadInput:
    """Return the error about tensors that belong to nothing."""
    more = f", and {len(extra) - 1} more" if len(extra) > 1 else ""
    message = f"unexpected tensor: {printable(extra[0], 200)}{more}"
    help = "the settings do not mean it: compare target_modules and modules_to_save"
    return BadInput("adapter.unexpected-tensor", message, where=where, help=help)


def _split(name: str, parts: Iterable[str]) -> tuple[str, str]:
    """Split a name into its module and one of the parts, or say that it ends in none."""
    part = next((part for part in parts if name == part or name.endswith(f".{part}")), "")
    return name.removesuffix(part).removesuffix("."), part


def _join(module: str, part: str) -> str:
    return f"{module}.{part}" if module else part


def _first_expected(method: type[Method], config: PeftConfig) -> list[str]:
    targets = config.values.get("target_modules")
    module = str(targets[0]) if isinstance(targets, list) and targets else "…"
    prefix = method.PREFIX and f"{method.PREFIX}{module}."
    return [f"{prefix}{part}" for part in sorted(method.PARTS[0])]
