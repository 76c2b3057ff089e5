"""How many tokens a model has positions for is what it can compute, whatever its architecture calls them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers

from legit_worker.models.lengths import positions

#: The size that each configuration names.
SIZE = 24

SMALL: dict[str, Any] = {
    **dict.fromkeys(("vocab_size",), 40),
    **dict.fromkeys(
        ("hidden_size", "d_model", "n_embd", "intermediate_size", "encoder_ffn_dim", "decoder_ffn_dim"), 16
    ),
    **dict.fromkeys(("num_hidden_layers", "encoder_layers", "decoder_layers", "n_layer", "num_attention_heads"), 2),
    **dict.fromkeys(("encoder_attention_heads", "decoder_attention_heads", "n_head", "num_key_value_heads"), 2),
    **{"ffn_dim": 16, "word_embed_proj_dim": 16, "head_dim": 8, "pad_token_id": 1, "attention_window": 4},
    **{"max_position_embeddings": SIZE, "n_positions": SIZE, "bos_token_id": 0, "eos_token_id": 2},
    **{"cls_token_id": 3, "sep_token_id": 4, "decoder_start_token_id": 2, "dim": 16, "n_heads": 2, "n_layers": 2},
    **{"max_encoder_position_embeddings": SIZE, "max_decoder_position_embeddings": SIZE, "hidden_dim": 16},
}


def small(name: str) -> Any:
    """A module with a small random model of this architecture, as the library's `Transformer` holds one."""
    config = getattr(transformers, f"{name}Config")
    known = {**config().to_dict(), **dict.fromkeys(config.attribute_map)}
    route = torch.nn.Module()
    route.model = getattr(transformers, f"{name}Model")(
        config(**{option: value for option, value in SMALL.items() if option in known})
    )
    return route.eval()


def computes(route: Any, tokens: int) -> bool:
    """Whether it takes a text of this length."""
    try:
        with torch.inference_mode():
            route.model(input_ids=torch.full((1, tokens), 5), attention_mask=torch.ones(1, tokens, dtype=torch.long))
    except (IndexError, RuntimeError, ValueError):
        return False
    return True


@pytest.mark.parametrize(
    ("name", "most"),
    [
        *((name, SIZE) for name in ("Bert", "DistilBert", "Electra", "GPT2", "Bart", "OPT", "MBart")),
        *((name, SIZE - 2) for name in ("Roberta", "XLMRoberta", "MPNet", "Camembert")),
    ],
)
def test_learned_positions_are_counted(name: str, most: int) -> None:
    route = small(name)
    assert positions(route) == most
    assert computes(route, most)
    assert not computes(route, most + 1)


@pytest.mark.parametrize("name", ["ModernBert", "Qwen3", "Llama"])
def test_rotary_positions_have_no_end(name: str) -> None:
    route = small(name)
    assert positions(route) is None
    assert computes(route, 2 * SIZE)
