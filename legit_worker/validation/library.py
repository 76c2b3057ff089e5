"""What sentence-transformers gives, without a worker: one input at a time, on the CPU, as an alias's options say.

In: texts, and a model's settings. Out: rows of a reference, and the type in which the model computes.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from legit_worker import golden
from legit_worker.settings import ModelSettings
from legit_worker.validation import forms
from legit_worker.validation.forms import Row
from legit_worker.validation.reference import ValidationError

#: The library's class of each kind.
CLASSES = {
    "embed": "SentenceTransformer",
    "image": "SentenceTransformer",
    "sparse": "SparseEncoder",
    "multi": "MultiVectorEncoder",
    "rerank": "CrossEncoder",
}

#: The arguments of `encode` that an alias has a setting for, by that setting.
ASKED = {
    "prompt_name": "prompt_name",
    "prompt": "prompt",
    "dimensions": "truncate_dim",
    "precision": "precision",
    "normalize": "normalize_embeddings",
}

#: The settings of an alias that give way to a call's own task.
WORDS = ("prompt_name", "prompt")

#: Texts of at most this many characters are compared as queries and documents, too.
SHORT = 300

#: The forms of pixels that pictures have in turn. The second one is partly transparent.
MODES = ("RGB", "RGBA", "L", "P")

#: Documents for each query of a reranker. The texts are cut into groups of this size.
DOCUMENTS = 12


class Library:
    """One model, as the library loads it."""

    def __init__(self, model: ModelSettings, dtype: str | None) -> None:
        """`dtype`: the type of the weights; None is the type of the model's files. Raises `ValidationError`."""
        import sentence_transformers

        self._spec = model
        options = {**model.model_kwargs, **({"dtype": dtype} if dtype else {})}
        try:
            self._model = getattr(sentence_transformers, CLASSES[model.kind])(
                model.path,
                device="cpu",
                revision=model.revision,
                trust_remote_code=model.trust_remote_code,
                local_files_only=model.local_files_only,
                model_kwargs=options,
                processor_kwargs=model.processor_kwargs,
            )
        except Exception as error:
            raise ValidationError(f"the model at {model.path} can't be loaded: {error}") from error
        if model.max_seq_length is not None:
            self._model.max_seq_length = model.max_seq_length

    @property
    def dtype(self) -> str:
        """The type in which it computes."""
        floats = (str(one.dtype) for one in self._model.parameters() if one.is_floating_point())
        return next(floats, "torch.float32").removeprefix("torch.")

    def rows(self, texts: Sequence[str]) -> Iterator[Row]:
        """Compute the answers of the inputs that this kind takes."""
        if self._spec.kind == "rerank":
            return self._ranked(texts) if self._model.num_labels == 1 else self._classified(texts)
        if self._spec.kind == "image":
            return self._of_pictures(texts)
        return self._embedded(texts)

    def _embedded(self, texts: Sequence[str]) -> Iterator[Row]:
        form, answer = _TEXTS.get(self._spec.kind, (forms.VECTOR, _dense))
        for text in texts:
            yield Row(form=form, asked={"text": text}, right=answer(self._encode(text)))
        for task in self._tasks(texts[0]):
            for text in texts:
                if len(text) <= SHORT:
                    right = answer(self._encode(text, task))
                    yield Row(form=form, asked={"text": text, "task": task}, right=right)

    def _tasks(self, text: str) -> Iterator[str]:
        """Yield the tasks that change a text's answer."""
        answer = _TEXTS.get(self._spec.kind, (forms.VECTOR, _dense))[1]
        plain = answer(self._encode(text))
        for task in ("query", "document"):
            if hasattr(self._model, f"encode_{task}") and answer(self._encode(text, task)) != plain:
                yield task

    def _encode(self, value: Any, task: str | None = None) -> Any:
        spec, kind = self._spec, self._spec.kind
        said = {ASKED[name]: getattr(spec, name) for name in ASKED if not (task and name in WORDS)}
        options = {name: value for name, value in said.items() if value is not None}
        if kind == "multi":
            options["convert_to_numpy"] = True
        task = task or spec.task
        encode = getattr(self._model, f"encode_{task}" if task else "encode")
        return encode(value, show_progress_bar=False, **options)

    def _of_pictures(self, texts: Sequence[str]) -> Iterator[Row]:
        from PIL import Image

        for place, picture in enumerate(golden.pictures()):
            file = io.BytesIO()
            if place % 4 == 1:
                picture.putalpha(picture.convert("L"))
            picture.convert(MODES[place % 4]).save(file, "PNG")
            right = _dense(self._encode(Image.open(file)))
            yield Row(form=forms.IMAGE, asked={"image": base64.b64encode(file.getvalue()).decode()}, right=right)
        if "text" in self._model.modalities:
            yield from self._embedded(texts)

    def _ranked(self, texts: Sequence[str]) -> Iterator[Row]:
        for start in range(0, len(texts), DOCUMENTS):
            documents = list(texts[start : start + DOCUMENTS])
            query = min(documents, key=len)
            found = self._model.rank(query, documents, show_progress_bar=False, batch_size=1, **self._worded())
            right = [{"index": int(one["corpus_id"]), "score": float(one["score"])} for one in found]
            yield Row(form=forms.RERANK, asked={"query": query, "documents": documents}, right=right)

    def _classified(self, texts: Sequence[str]) -> Iterator[Row]:
        names = self._model.config.id2label
        for text in texts:
            pair = [texts[0], text]
            found = self._model.predict(pair, show_progress_bar=False, apply_softmax=True, **self._worded()).tolist()
            named = [{"label": str(names.get(place, place)), "score": score} for place, score in enumerate(found)]
            right = sorted(named, key=lambda one: -one["score"])
            yield Row(form=forms.CLASSIFY, asked={"pair": pair}, right=right)

    def _worded(self) -> dict[str, str]:
        return {name: value for name in WORDS if (value := getattr(self._spec, name)) is not None}


def _dense(found: Any) -> Any:
    return found.tolist()


def _sparse(found: Any) -> Any:
    found = found.coalesce()
    return {"indices": found.indices()[-1].tolist(), "values": found.values().float().tolist()}


#: What a kind that takes texts answers, and how the library's answer becomes JSON.
_TEXTS: dict[str, tuple[forms.Form, Callable[[Any], Any]]] = {
    "sparse": (forms.SPARSE, _sparse),
    "multi": (forms.MULTI, _dense),
}
