"""Train the demo's draft model on a CPU, in a few minutes: python -m demo_model.train_draft

It is a Llama for text with the demo checkpoint's tokenizer, trained on the answers of the same conversations without
their images: it drafts the wording of an answer, not what the image shows.
"""

import argparse
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm
from transformers import AutoConfig, AutoProcessor, GenerationConfig, LlamaConfig, LlamaForCausalLM

from demo_model.scenes import random_scene
from demo_model.train import TEXT_ONLY, Batches, pick, random_size, rate_at

DEMO = Path(__file__).parent


def make_draft(tokenizer, text_config) -> LlamaForCausalLM:
    """Return a model of 0.36 million random parameters; the head is tied to the embedding, as in the real 1B."""
    config = LlamaConfig(
        vocab_size=text_config.vocab_size,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=text_config.max_position_embeddings,
        tie_word_embeddings=True,
        bos_token_id=text_config.bos_token_id,
        eos_token_id=text_config.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return LlamaForCausalLM(config)


def conversations(batches: Batches, count: int) -> dict[str, torch.Tensor]:
    """Return ids and labels of `count` conversations about scenes that are not drawn, and some without a scene."""
    told = []
    for _ in range(count):
        scene = random_scene(batches.rng, *random_size(batches.rng), batches.held_out)
        asked = batches.rng.permutation(len(scene.questions))[: batches.rng.integers(1, 4)]
        told.append(batches.conversation([scene.questions[i][1:] for i in asked], image=False))
    told += [batches.conversation([pick(batches.rng, *TEXT_ONLY)], image=False) for _ in range(count // 16)]
    return batches.rows(told)[0]


def loss_of(model: LlamaForCausalLM, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """Return the mean cross-entropy of the answers' tokens."""
    labels = batch["labels"][:, 1:]
    chosen = labels != -100
    hidden = model.model(input_ids=batch["input_ids"], use_cache=False)[0][:, :-1]
    return F.cross_entropy(model.lm_head(hidden[chosen]), labels[chosen])


def main() -> None:
    """Train and save the draft model."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=DEMO / "draft", help="folder for the checkpoint")
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--batch", type=int, default=48, help="conversations a step")
    options = parser.parse_args()
    torch.manual_seed(0)
    processor = AutoProcessor.from_pretrained(DEMO)
    model = make_draft(processor.tokenizer, AutoConfig.from_pretrained(DEMO).text_config)
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.01)
    train, losses = Batches(processor.tokenizer, processor, seed=3), []
    for step in tqdm(range(options.steps), mininterval=10):
        for group in optimizer.param_groups:
            group["lr"] = rate_at(step, options.steps, 4e-3)
        loss = loss_of(model, conversations(train, options.batch))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step(), optimizer.zero_grad()
        losses.append(loss.item())
        if (step + 1) % 500 == 0:
            test = Batches(processor.tokenizer, processor, seed=98, held_out=True)
            with torch.no_grad():
                held_out = loss_of(model, conversations(test, 256)).item()
            tqdm.write(f"step {step + 1}: loss {np.mean(losses[-500:]):.3f}, held out {held_out:.3f}")
    text = model.config
    model.generation_config = GenerationConfig(
        bos_token_id=text.bos_token_id, eos_token_id=text.eos_token_id, pad_token_id=text.pad_token_id
    )
    model.config.dtype = torch.bfloat16
    model.to(torch.bfloat16).save_pretrained(options.out)
    processor.tokenizer.save_pretrained(options.out)


if __name__ == "__main__":
    main()
