"""Models of every built-in kind, small and random, built on disk in a second: no download, no meaning, real code paths.

In: a folder. Out: paths that sentence-transformers loads. Weights come from a fixed seed, wide enough that different
inputs give clearly different outputs; a trained model's would, and freshly initialised ones hardly do.
"""

from __future__ import annotations

import string
from collections.abc import Callable, Sized
from pathlib import Path
from typing import Any

#: Tokens that the text models take, special ones included: few, so that a test's over-long text is short.
MAX_TOKENS = 64

#: Side of the square images that the image model takes, in pixels.
IMAGE_SIZE = 32

#: Side of the squares that an image is cut into.
PATCH_SIZE = 8

#: Length of the image model's vectors.
IMAGE_DIMENSION = 24

#: Standard deviation of random weights: the usual 0.02 leaves all outputs nearly equal.
SPREAD = 0.3

SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
WORDS = ["the", "of", "a", "cat", "dog", "sat", "on", "mat", "query", "document", "red", "apple", "river", "is", "old"]


def vocabulary() -> dict[str, int]:
    """Some whole words, and every ASCII character as a start and as a continuation: any ASCII text has tokens."""
    characters = [*string.ascii_lowercase, *string.digits, *string.punctuation]
    pieces = dict.fromkeys([*SPECIAL, *characters, *(f"##{character}" for character in characters), *WORDS])
    return {piece: number for number, piece in enumerate(pieces)}


def build_cross_encoder(folder: Path, labels: int = 1) -> Path:
    """A `CrossEncoder` on two BERT layers."""
    from transformers import BertForSequenceClassification

    return _save_bert(BertForSequenceClassification, folder, num_labels=labels)


def build_dense(folder: Path, default: str | None = None, *, include_prompt: bool = True) -> Path:
    """A `SentenceTransformer`: BERT, mean pooling, and two prompts of which `default` stands before every text.

    `include_prompt`: whether the pooling counts the prompt's tokens.
    """
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.base.modules import Transformer
    from sentence_transformers.sentence_transformer.modules import Pooling
    from transformers import BertModel

    bert = Transformer(str(_save_bert(BertModel, folder / "bert")))
    pooling = Pooling(bert.get_embedding_dimension(), pooling_mode="mean", include_prompt=include_prompt)
    prompts = {"query": "query: ", "document": "document: "}
    model = SentenceTransformer(modules=[bert, pooling], prompts=prompts, default_prompt_name=default)
    model.save(str(folder / "model"))
    return folder / "model"


def build_decoder(folder: Path) -> Path:
    """A `SentenceTransformer` on Qwen 3, padded on the left, whose last token's vector is the text's."""
    import torch
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.base.modules import Transformer
    from sentence_transformers.sentence_transformer.modules import Pooling
    from transformers import BertTokenizer, Qwen3Config, Qwen3Model

    pieces = vocabulary()
    torch.manual_seed(0)
    config = Qwen3Config(**_small(pieces), num_key_value_heads=2, head_dim=16, pad_token_id=0)
    _scatter(Qwen3Model(config)).save_pretrained(folder / "qwen")
    tokenizer = BertTokenizer(vocab=pieces, model_max_length=MAX_TOKENS, padding_side="left")
    tokenizer.save_pretrained(folder / "qwen")
    qwen = Transformer(str(folder / "qwen"))
    pooling = Pooling(qwen.get_embedding_dimension(), pooling_mode="lasttoken")
    SentenceTransformer(modules=[qwen, pooling]).save(str(folder / "model"))
    return folder / "model"


def build_routed(folder: Path) -> Path:
    """A `SentenceTransformer` with a way of their own for queries: static vectors there, BERT for documents."""
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.base.modules import Router, Transformer
    from sentence_transformers.sentence_transformer.modules import Pooling, StaticEmbedding
    from transformers import BertModel

    bert = Transformer(str(_save_bert(BertModel, folder / "bert")))
    pooling = Pooling(bert.get_embedding_dimension(), pooling_mode="mean")
    static = StaticEmbedding(bert.tokenizer.backend_tokenizer, embedding_dim=bert.get_embedding_dimension())
    router = Router.for_query_document([_scatter(static)], [bert, pooling])
    model = SentenceTransformer(modules=[router], similarity_fn_name="dot")
    model.save(str(folder / "model"))
    return folder / "model"


def build_unmasked(folder: Path) -> Path:
    """A `SentenceTransformer` with a CNN behind BERT, which reads the padding beside a text."""
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.base.modules import Transformer
    from sentence_transformers.sentence_transformer.modules import CNN, Pooling
    from transformers import BertModel

    bert = Transformer(str(_save_bert(BertModel, folder / "bert")))
    cnn = _scatter(CNN(bert.get_embedding_dimension(), out_channels=8))
    model = SentenceTransformer(modules=[bert, cnn, Pooling(cnn.get_embedding_dimension(), pooling_mode="mean")])
    model.save(str(folder / "model"))
    return folder / "model"


def build_two_lengths(folder: Path, query: int, document: int) -> Path:
    """A `SentenceTransformer` with two routes on BERT that read so many tokens."""
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.base.modules import Router, Transformer
    from sentence_transformers.sentence_transformer.modules import Pooling
    from transformers import BertModel

    path = str(_save_bert(BertModel, folder / "bert"))
    routes = []
    for tokens in (query, document):
        bert = Transformer(path, max_seq_length=tokens)
        routes.append([bert, Pooling(bert.get_embedding_dimension(), pooling_mode="mean")])
    SentenceTransformer(modules=[Router.for_query_document(*routes)]).save(str(folder / "model"))
    return folder / "model"


def build_capped(folder: Path, tokens: int) -> Path:
    """A `SentenceTransformer` that cuts its queries after so many tokens, and has no prompts."""
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.base.modules import Transformer
    from sentence_transformers.sentence_transformer.modules import Pooling
    from transformers import BertModel

    bert = Transformer(str(_save_bert(BertModel, folder / "bert")), query_length=tokens)
    pooling = Pooling(bert.get_embedding_dimension(), pooling_mode="mean")
    SentenceTransformer(modules=[bert, pooling]).save(str(folder / "model"))
    return folder / "model"


def build_multi(folder: Path) -> Path:
    """A `MultiVectorEncoder`: BERT, a projection, and queries that are filled up to a width, as ColBERT's are."""
    import string

    import torch
    from sentence_transformers import MultiVectorEncoder
    from sentence_transformers.base.modules import Dense, Normalize, Transformer
    from sentence_transformers.multi_vector_encoder.modules import MultiVectorMask
    from transformers import BertModel

    expansion = {"strategy": "fixed", "attend": False, "length": 16}
    bert = Transformer(str(_save_bert(BertModel, folder / "bert")), query_expansion=expansion)
    torch.manual_seed(0)
    dense = Dense(32, 12, bias=False, activation_function=torch.nn.Identity(), module_input_name="token_embeddings")
    mask = MultiVectorMask(skiplist_words=list(string.punctuation))
    modules = [bert, dense, mask, Normalize(module_input_name="token_embeddings")]
    MultiVectorEncoder(modules=modules, prompts={"query": "query: ", "document": "document: "}).save(
        str(folder / "model")
    )
    return folder / "model"


def build_sparse(folder: Path) -> Path:
    """A `SparseEncoder`: BERT's word predictions, SPLADE pooling."""
    from sentence_transformers import SparseEncoder
    from sentence_transformers.base.modules import Transformer
    from sentence_transformers.sparse_encoder.modules import SpladePooling
    from transformers import BertForMaskedLM

    bert = Transformer(str(_save_bert(BertForMaskedLM, folder / "bert")), transformer_task="fill-mask")
    SparseEncoder(modules=[bert, SpladePooling(pooling_strategy="max")]).save(str(folder / "model"))
    return folder / "model"


def build_image(folder: Path, prompt: str | None = None) -> Path:
    """A `SentenceTransformer` on CLIP, of images and texts. Pillow prepares the images: torchvision is not needed.

    `prompt` stands before each text.
    """
    import torch
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.base.modules import Transformer
    from transformers import CLIPConfig, CLIPModel, CLIPProcessor
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    clip = folder / "clip"
    tokenizer = _clip_tokenizer()
    half = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    torch.manual_seed(0)
    config = CLIPConfig(
        text_config={
            **half,
            "vocab_size": len(tokenizer),
            "max_position_embeddings": MAX_TOKENS,
            "bos_token_id": tokenizer.bos_token_id,
            "eos_token_id": tokenizer.eos_token_id,
            "pad_token_id": tokenizer.pad_token_id,
        },
        vision_config={**half, "image_size": IMAGE_SIZE, "patch_size": PATCH_SIZE},
        projection_dim=IMAGE_DIMENSION,
    )
    _scatter(CLIPModel(config)).save_pretrained(clip)
    side = {"height": IMAGE_SIZE, "width": IMAGE_SIZE}
    images = CLIPImageProcessorPil(size={"shortest_edge": IMAGE_SIZE}, crop_size=side)
    CLIPProcessor(image_processor=images, tokenizer=tokenizer).save_pretrained(clip)
    prompts = {"prompts": {"search": prompt}, "default_prompt_name": "search"} if prompt else {}
    SentenceTransformer(modules=[Transformer(str(clip))], **prompts).save(str(folder / "model"))
    return folder / "model"


def build_text_and_image(folder: Path) -> Path:
    """A `SentenceTransformer` on ViLT, of which each input is a text and an image."""
    import torch
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.base.modules import Transformer
    from transformers import BertTokenizer, ViltConfig, ViltModel, ViltProcessor
    from transformers.models.vilt.image_processing_pil_vilt import ViltImageProcessorPil

    pieces = vocabulary()
    torch.manual_seed(0)
    config = ViltConfig(**_small(pieces), image_size=IMAGE_SIZE, patch_size=PATCH_SIZE)
    vilt = folder / "vilt"
    _scatter(ViltModel(config)).save_pretrained(vilt)
    images = ViltImageProcessorPil(size={"shortest_edge": IMAGE_SIZE}, size_divisor=PATCH_SIZE)
    tokenizer = BertTokenizer(vocab=pieces, model_max_length=MAX_TOKENS)
    ViltProcessor(image_processor=images, tokenizer=tokenizer).save_pretrained(vilt)
    both = {("image", "text"): {"method": "forward", "method_output_name": "pooler_output"}}
    module = Transformer(str(vilt), modality_config=both, module_output_name="sentence_embedding")
    SentenceTransformer(modules=[module]).save(str(folder / "model"))
    return folder / "model"


BUILDERS: dict[str, Callable[[Path], Path]] = {
    "embed": build_dense,
    "rerank": build_cross_encoder,
    "sparse": build_sparse,
    "image": build_image,
}


def picture(seed: int, width: int = 40, height: int = 48) -> Any:
    """A `PIL.Image.Image` of random coloured squares, another for each seed."""
    import numpy as np
    from PIL import Image

    squares = np.random.default_rng(seed).integers(0, 256, size=(6, 5, 3), dtype=np.uint8)
    return Image.fromarray(squares).resize((width, height), Image.Resampling.NEAREST)


def _small(pieces: Sized) -> dict[str, int]:
    """The sizes of a model that reads texts of these tokens."""
    return {
        "vocab_size": len(pieces),
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "max_position_embeddings": MAX_TOKENS,
    }


def _save_bert(architecture: Any, folder: Path, **options: Any) -> Path:
    import torch
    from transformers import BertConfig, BertTokenizer

    pieces = vocabulary()
    torch.manual_seed(0)
    config = BertConfig(**_small(pieces), **options)
    _scatter(architecture(config)).save_pretrained(folder)
    BertTokenizer(vocab=pieces, model_max_length=MAX_TOKENS).save_pretrained(folder)
    return folder


def _clip_tokenizer() -> Any:
    from transformers import CLIPTokenizer

    special = ["<|startoftext|>", "<|endoftext|>"]
    characters = [*string.ascii_lowercase, *string.digits, *string.punctuation]
    pieces = dict.fromkeys([*characters, *(f"{character}</w>" for character in characters), *special])
    vocab = {piece: number for number, piece in enumerate(pieces)}
    return CLIPTokenizer(vocab=vocab, merges=[], model_max_length=MAX_TOKENS)


def _scatter(model: Any) -> Any:
    """Redraw every matrix wide, in place."""
    import torch

    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=SPREAD)
    return model.eval()
