"""Models that adapters of peft's can be put on."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from torch import nn

from nnsight.core.history import user_place
from nnsight.core.owner import runs_of_all_threads
from nnsight.core.run import Run
from nnsight.errors import AdapterError, BlockError
from nnsight.models import adapter_layers, adapters, loading
from nnsight.root import NNsight

if TYPE_CHECKING:
    from typing_extensions import Self

_BARE, _EDITED = " of what without_adapter() gave", " of the edited model, the one that `edit` gave"
_LOOKUP = frozenset({"token", "cache_dir", "local_files_only"})  # what holds for the adapter as for the model


class Adapted(NNsight):
    """A model with at most one adapter.

    Attributes:
        peft: The adapter that is on it, as it was given; None without one.
    """

    peft: str | None = None
    repo_id: str | None = None
    _accepts: Any = None
    _fitted: adapters.Fitted | None = None
    _is_bare: bool = False  # whether it is the model without its adapter
    _lookup: Mapping[str, Any]

    def _begin_adapters(self, peft: str | os.PathLike[str] | None, lookup: Mapping[str, Any]) -> None:
        """Puts the first adapter on, if there is one. `lookup`: with what options the model was looked for."""
        self._lookup = {name: lookup[name] for name in _LOOKUP & lookup.keys()}
        if peft is not None:
            self.load_adapter(peft)

    def _fitted_on(self, loaded: nn.Module) -> adapters.Fitted | None:
        """The adapter of this model, put on one that has the weights."""
        fitted = self._fitted
        if fitted is None or fitted.adapter is None:
            return fitted
        return adapters.put_on(loaded, fitted.adapter, self.repo_id, is_known=True)

    def load_adapter(self, peft: str | os.PathLike[str] | None, **options: Any) -> None:
        """Puts an adapter of peft's on the model, in place of the one that it has; None takes that off.

        The modules that it targets become the adapter's layers, which have the module itself as `.base_layer`; all
        others stay as they are. Without an adapter, the model is as it was, to the very parameters. Envoys that were
        taken before stay valid: they are those of their paths.

        Args:
            peft: A folder, or a name on the hub.
            options: Where to look for it: `revision`, `subfolder`, `token`, `cache_dir`.

        Raises:
            AdapterError: It doesn't fit: no module is what it targets, or its weights are another model's. The model
                is as before.
            HubError: It isn't there.
            MissingPackageError: There is no `peft`.
        """
        if any(model._run_or_none() is not None for model in self._family()):
            raise BlockError(
                "An adapter can't come or go while the model runs.",
                you_wrote=user_place().source,
                instead="before the trace, or model.without_adapter() beside it",
            )
        self._check_no_other_runs()
        adapter = None if peft is None else adapters.read(peft, {**self._lookup, **options})
        with loading.loading:
            before = self._fitted
            adapter_layers.check_unmerged(self._tree.root)
            if before is not None:
                before.exchange()
            after: adapters.Fitted | None = None
            try:
                after = None if adapter is None else adapters.put_on(self._tree.root, adapter, self.repo_id)
                self._check_edits()
            except BaseException:
                for fitted in (after, before):
                    if fitted is not None:
                        fitted.exchange()
                raise
            finally:
                self._follow_modules()
            for model in self._family():
                model.__dict__.update(peft=None if adapter is None else adapter.where, _fitted=after, _accepts=None)
                if model._is_bare:
                    adapter_layers.leave_all_out(model)

    def _check_no_other_runs(self) -> None:
        """Refuses while a trace is open anywhere: on another thread, in another task, in a generator."""
        for owner, run in runs_of_all_threads():
            if isinstance(run, Run) and run.outer.family is self._tree.family and run.is_open:
                where = "in another task or generator" if owner.is_here() else f"on the thread {owner.name!r}"
                raise BlockError(
                    f"An adapter can't come or go while the model runs, as it does {where}.",
                    you_wrote=user_place().source,
                    instead="behind the trace there, or a model of its own for each",
                )

    def without_adapter(self) -> Self:
        """The same model, on the same modules, in whose runs the adapter takes no part: to compare with and without.

        `with model.trace(prompt) as tuned, model.without_adapter().trace(prompt) as bare:`

        Raises:
            AdapterError: There is no adapter, or it changes weights of the model's own.
        """
        if not adapter_layers.layers_in(self._tree.root):
            raise AdapterError("This model has no adapter.", instead="model.load_adapter(path)")
        adapter_layers.check_unmerged(self._tree.root)
        if self._fitted is not None and self._fitted.changes_own():
            raise AdapterError(
                "This adapter has other values for weights of the model's own, such as biases, which all runs share.",
                instead="model.load_adapter(None), and a trace before and after it",
            )
        bare = self._view()
        bare._is_bare = True
        adapter_layers.leave_all_out(bare)
        return bare

    def _check_edits(self) -> None:
        """Refuses to take away modules that are edited."""
        root = self._tree.root
        known = {name for name, _ in root.named_modules()}
        for model in self._family():
            lost = [edit for edit in model._tree.edits if edit.path not in known]
            if lost:
                holder = "" if model is self else _BARE if model._is_bare else _EDITED
                raise AdapterError(
                    f"`{lost[0].path}` would go with the adapter, and is edited{holder and ' in a view of the model'}.",
                    edited_at=lost[0].place.quoted,
                    instead=f"clear_edits(){holder}, and then load_adapter(...)",
                )
