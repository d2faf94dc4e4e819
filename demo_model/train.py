"""Train the demo checkpoint on two CPU cores, from scratch or from another: python -m demo_model.train

Training starts on one-tile images with a vision tower of one tile (a quarter of the work), then uses all canvases. Each
image is encoded once for several questions. An auxiliary head predicts what each patch shows and its quarter of the
image: 128 labels per tile train the tower long before the answers alone would. An interrupted run resumes from
`--run-dir`.
"""

import argparse
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm
from transformers import AutoProcessor, MllamaForConditionalGeneration
from transformers.models.mllama.image_processing_pil_mllama import (
    get_image_size_fit_to_canvas,
    get_optimal_tiled_canvas,
)
from transformers.models.mllama.modeling_mllama import MllamaVisionModel

from demo_model.checkpoint import (
    IMAGE,
    PATCH,
    SPECIAL,
    TILE,
    TILE_EMBEDDINGS,
    clear_padding_embeddings,
    make_model,
    make_processor,
    make_tokenizer,
    save,
)
from demo_model.scenes import (
    COLOURS,
    MAKERS,
    NUMBERS,
    PLACES,
    SHAPES,
    Scene,
    digit_scene,
    draw,
    pick,
    placed_scene,
    random_scene,
)

SYSTEM = ("You are a helpful assistant.", "Answer briefly.", "You look at pictures and answer questions about them.")
TEXT_ONLY = (
    ("Who are you?", "I am a tiny demo model that looks at drawings."),
    ("What can you do?", "I describe shapes, count them and read digits."),
    ("Hello!", "Hello! Show me a drawing."),
    ("Thank you!", "You are welcome!"),
    ("How are you?", "Fine, thank you."),
)
KINDS = (*SHAPES, *"0123456789")
PRACTICE = (*4 * MAKERS, *5 * (digit_scene, placed_scene))  # more of the tasks that take longest to learn
GROUPS = 4  # per batch, of conversations of similar length
RATIOS = ((1, 1), (1, 2), (1, 3), (1, 4), (2, 1), (2, 2), (3, 1), (4, 1))  # tiles high, tiles wide


def corpus() -> list[str]:
    """Return texts in which every word of the domain occurs, for the tokenizer."""
    rng = np.random.default_rng(0)
    texts = [text for pair in TEXT_ONLY for text in pair] + list(SYSTEM) + ["system", "user", "assistant"] * 50
    for _ in range(3000):
        width, height = random_size(rng)
        texts += [text for _, *pair in random_scene(rng, width, height).questions for text in pair]
    return texts + [f" {word}" for word in (*SHAPES, *COLOURS, *NUMBERS, *PLACES)] * 20


# ---- Batches --------------------------------------------------------------------------------------------------------


def random_size(rng) -> tuple[int, int]:
    """Return (width, height) of a random image as resized by the processor, over all canvases."""
    height, width = [(1, 1), (1, 1), (1, 2), (2, 1), (2, 2), (2, 2), (1, 3), (3, 1), (1, 4), (4, 1)][rng.integers(10)]
    source = [round(tiles * TILE * rng.choice([1.0, rng.uniform(0.7, 1.0)])) for tiles in (height, width)]
    canvas = get_optimal_tiled_canvas(*source, 4, TILE)
    height, width = get_image_size_fit_to_canvas(*source, *canvas, TILE)
    return int(width), int(height)


def to_tiles(picture: np.ndarray, mean: np.ndarray, std: np.ndarray) -> tuple[np.ndarray, int, int]:
    """Return an image that needs no resizing as (f32 [4, 3, TILE, TILE], aspect ratio id, number of tiles)."""
    height, width = picture.shape[:2]
    canvas_height, canvas_width = get_optimal_tiled_canvas(height, width, 4, TILE)
    canvas = np.zeros((canvas_height, canvas_width, 3), np.float32)
    canvas[:height, :width] = picture
    rows, columns = canvas_height // TILE, canvas_width // TILE
    canvas = (canvas / 255 - mean) / std
    tiles = np.zeros((4, 3, TILE, TILE), np.float32)
    split = canvas.reshape(rows, TILE, columns, TILE, 3).transpose(0, 2, 4, 1, 3)
    tiles[: rows * columns] = split.reshape(-1, 3, TILE, TILE)
    return tiles, RATIOS.index((rows, columns)) + 1, rows * columns


def patch_labels(scene: Scene) -> np.ndarray:
    """Return the labels of each patch of the tiles, i64 [2, 4, patches]: its content (0 for background, else kind and
    colour) and its quarter of the image; -100 outside the image."""
    height, width = get_optimal_tiled_canvas(scene.height, scene.width, 4, TILE)
    y, x = (np.arange(height) + 0.5) / scene.height, (np.arange(width) + 0.5) / scene.width
    y, x = y[PATCH // 2 :: PATCH], x[PATCH // 2 :: PATCH]
    shown = np.zeros((len(y), len(x)), np.int64)
    for thing in scene.things:
        half = thing.size / 2 * min(scene.height, scene.width)
        rows, columns = abs(y - thing.y) < half / scene.height, abs(x - thing.x) < half / scene.width
        shown[np.ix_(rows, columns)] = 1 + KINDS.index(thing.kind) * len(COLOURS) + list(COLOURS).index(thing.colour)
    quarter = (y > 0.5)[:, None] * 2 + (x > 0.5)
    outside = (y > 1)[:, None] | (x > 1)
    labels = np.where(outside, -100, np.stack([shown, quarter]))
    side, tiles = TILE // PATCH, np.full((2, 4, (TILE // PATCH) ** 2), -100, np.int64)
    split = labels.reshape(2, len(y) // side, side, len(x) // side, side).swapaxes(2, 3).reshape(2, -1, side * side)
    tiles[:, : split.shape[1]] = split
    return tiles


class Batches:
    """Endless seeded batches: images, and several conversations about each."""

    def __init__(self, tokenizer, processor, seed: int, held_out: bool = False):
        self.rng, self.held_out = np.random.default_rng(seed), held_out
        self.mean = np.array(processor.image_processor.image_mean, np.float32)
        self.std = np.array(processor.image_processor.image_std, np.float32)
        self.token = {name: tokenizer.convert_tokens_to_ids(name) for name in (*SPECIAL, IMAGE)}
        self.pad, self.tokenizer, self.cached = tokenizer.pad_token_id, tokenizer, {}

    def encode(self, text: str) -> list[int]:
        if text not in self.cached:
            if len(self.cached) > 50_000:
                self.cached.clear()
            self.cached[text] = self.tokenizer(text, add_special_tokens=False).input_ids
        return self.cached[text]

    def turn(self, role: str, text: str, image: bool = False) -> list[int]:
        token = self.token
        header = [token["<|start_header_id|>"], *self.encode(role), token["<|end_header_id|>"], *self.encode("\n\n")]
        return header + [token[IMAGE]] * image + self.encode(text) + [token["<|eot_id|>"]]

    def conversation(self, questions, image: bool = True) -> tuple[list[int], list[int]]:
        """Return token ids and labels (-100 except for the answers) of a few (question, answer) turns."""
        ids, labels = [self.token["<|begin_of_text|>"]], [-100]
        if self.rng.random() < 0.15:
            ids += self.turn("system", pick(self.rng, *SYSTEM))
            labels += [-100] * (len(ids) - len(labels))
        for i, (question, answer) in enumerate(questions):
            ids += self.turn("user", question, image and i == 0)
            full = self.turn("assistant", answer)
            header = len(full) - len(self.encode(answer)) - 1
            ids += full
            labels += [-100] * (len(ids) - len(labels) - len(full) + header) + full[header:]
        return ids, labels

    def rows(self, conversations, pictures=None) -> list[dict[str, torch.Tensor]]:
        """Return conversations in groups of similar length, each padded on its own: ids, labels, each row's image."""
        order, groups = sorted(range(len(conversations)), key=lambda i: len(conversations[i][0])), []
        for chosen in np.array_split(order, GROUPS if pictures else 1):
            length = len(conversations[chosen[-1]][0])
            ids, labels = torch.full((len(chosen), length), self.pad), torch.full((len(chosen), length), -100)
            for row, i in enumerate(chosen):
                tokens, targets = conversations[i]
                ids[row, : len(tokens)], labels[row, : len(tokens)] = torch.tensor(tokens), torch.tensor(targets)
            group = {"input_ids": ids, "labels": labels, "row": torch.from_numpy(chosen)}
            if pictures:
                group["picture"] = torch.tensor([pictures[i] for i in chosen])
            groups.append(group)
        return groups

    def practice(self, question: tuple[str, str, str]) -> float:
        """Return the weight of a question for being asked first: larger for those that take longest to learn."""
        if self.held_out:
            return 1.0
        return 8.0 if question[1].startswith("Where") else 3.0 if question[0] == "count" else 1.0

    def pictures(self, count: int, one_tile: bool, single_turn: bool = False) -> dict:
        """Return `count` images as tiles, and two conversations about each."""
        tiles, ratios, numbers, conversations, tasks, pictures, labels = [], [], [], [], [], [], []
        for picture in range(count):
            width, height = (TILE, TILE) if one_tile else random_size(self.rng)
            scene = random_scene(self.rng, width, height, self.held_out, MAKERS if self.held_out else PRACTICE)
            pixels, ratio, number = to_tiles(draw(scene, self.rng), self.mean, self.std)
            tiles.append(pixels), ratios.append(ratio), numbers.append(number), labels.append(patch_labels(scene))
            for _ in range(2):
                weights = np.array([self.practice(question) for question in scene.questions])
                order = self.rng.random(len(weights)) ** (1 / weights)
                asked, turns = np.argsort(-order), 1 if single_turn else self.rng.integers(1, 4)
                conversations.append(self.conversation([scene.questions[i][1:] for i in asked[:turns]]))
                tasks.append(scene.questions[asked[0]][0]), pictures.append(picture)
        return {
            "pixel_values": torch.from_numpy(np.stack(tiles)),
            "aspect_ratio_ids": torch.tensor(ratios)[:, None],
            "num_tiles": torch.tensor(numbers),
            "groups": self.rows(conversations, pictures),
            "patch_labels": torch.from_numpy(np.stack(labels)),
            "tasks": tasks,
        }


# ---- Model ----------------------------------------------------------------------------------------------------------


def one_tile_tower(tower: MllamaVisionModel) -> MllamaVisionModel:
    """Return a tower for one-tile canvases that shares the weights of `tower` except tile embeddings, all zero."""
    config = type(tower.config)(**{**tower.config.to_dict(), "max_num_tiles": 1, "supported_aspect_ratios": [[1, 1]]})
    small = MllamaVisionModel(config)
    for name in ("patch_embedding", "layernorm_pre", "layernorm_post", "transformer", "global_transformer"):
        setattr(small, name, getattr(tower, name))
    small.class_embedding = tower.class_embedding
    small.gated_positional_embedding.embedding = tower.gated_positional_embedding.embedding
    small.gated_positional_embedding.gate = tower.gated_positional_embedding.gate
    for module in (small.pre_tile_positional_embedding, small.post_tile_positional_embedding):
        torch.nn.init.zeros_(module.embedding.weight)
    torch.nn.init.zeros_(small.gated_positional_embedding.tile_embedding.weight)
    for module in (
        small.pre_tile_positional_embedding,
        small.post_tile_positional_embedding,
        small.gated_positional_embedding.tile_embedding,
    ):
        module.requires_grad_(False)
    return small


def vision_states(model, tower: MllamaVisionModel, batch: dict):
    """Return the cross-attention states of each image, [images, rows, hidden], and its tile mask [images, tiles]."""
    tiles = tower.config.max_num_tiles
    mask = (torch.arange(tiles)[None] < batch["num_tiles"][:, None]).long()
    features = tower(batch["pixel_values"][:, None, :tiles], batch["aspect_ratio_ids"], mask[:, None]).last_hidden_state
    return model.model.multi_modal_projector(features).flatten(1, 3), mask


def answer_logits(model, group: dict, states=None, mask=None):
    """Return logits and labels of a group's answer tokens, and their mask (bool [rows, length - 1])."""
    ids, pictures = group["input_ids"], {}
    if states is not None:
        after_image = (ids == model.config.image_token_index).cumsum(1).clamp(max=1)
        visible = after_image[:, :, None, None] * mask[group["picture"]][:, None, None, :]
        pictures = {"cross_attention_states": states[group["picture"]], "cross_attention_mask": visible}
    hidden = model.model(input_ids=ids, use_cache=False, **pictures)[0][:, :-1]
    labels = group["labels"][:, 1:]
    chosen = labels != -100
    return model.lm_head(hidden[chosen]), labels[chosen], chosen


def loss_of(model, tower, batch: dict, patch_head) -> torch.Tensor:
    """Return the mean cross-entropy of a batch's conversations, each weighted equally, plus that of all patches."""
    states, mask = vision_states(model, tower, batch)
    loss, count = 0.0, 0
    for group in batch["groups"]:
        logits, labels, chosen = answer_logits(model, group, states, mask)
        share = (chosen / chosen.sum(1, keepdim=True))[chosen]
        loss = loss + (share * F.cross_entropy(logits.float(), labels, reduction="none")).sum()
        count += len(chosen)
    tiles = mask.shape[1]
    patches = patch_head(states.unflatten(1, (tiles, -1))[:, :, 1:].float())  # row 0 of a tile is the class token's
    shown, quarter = patches.split([patches.shape[-1] - len(PLACES), len(PLACES)], dim=-1)
    labels = batch["patch_labels"][:, :, :tiles]
    return loss / count + sum(
        F.cross_entropy(logits.flatten(0, 2), labels[:, i].flatten()) for i, logits in enumerate((shown, quarter))
    )


@torch.no_grad()
def held_out_accuracy(model, tower, batches: Batches, one_tile: bool, pictures: int = 256) -> dict[str, float]:
    """Return the share of exactly right answers, by task. Every token is predicted from the right ones before it, so an
    answer is right exactly if greedy decoding would write it."""
    model.eval()
    right, asked = {}, {}
    for _ in range(pictures // 32):
        batch = batches.pictures(32, one_tile, single_turn=True)
        states, mask = vision_states(model, tower, batch)
        for group in batch["groups"]:
            logits, labels, chosen = answer_logits(model, group, states, mask)
            wrong = torch.zeros(chosen.shape, dtype=torch.bool)
            wrong[chosen] = logits.argmax(-1) != labels
            for row, bad in zip(group["row"], wrong.any(1), strict=True):
                task = batch["tasks"][row]
                asked[task], right[task] = asked.get(task, 0) + 1, right.get(task, 0) + (not bad)
    model.train()
    shares = {task: right[task] / asked[task] for task in sorted(asked)}
    return {"all": sum(right.values()) / sum(asked.values()), **shares}


# ---- Training -------------------------------------------------------------------------------------------------------


def optimizers(model, patch_head, rate: float):
    """Muon for the matrices inside the layers, AdamW for embeddings, head, norms and gates."""
    inside = [p for n, p in model.named_parameters() if p.ndim == 2 and "embed" not in n and "lm_head" not in n]
    known = {id(p) for p in inside}
    rest = [p for part in (model, patch_head) for p in part.parameters() if id(p) not in known]
    return [
        torch.optim.Muon(inside, lr=rate, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(rest, lr=rate, betas=(0.9, 0.98), weight_decay=0.0),
    ]


def keep_padding_alike(model: MllamaForConditionalGeneration) -> None:
    """Zeros for the embeddings of padding tiles, now and after every step, as in Meta's checkpoints: without gradients
    AdamW leaves them there (it is given no weight decay)."""
    clear_padding_embeddings(dict(model.named_parameters()), model.config)
    for name, parameter in model.named_parameters():
        if name.endswith(TILE_EMBEDDINGS):
            real = torch.ones_like(parameter)
            clear_padding_embeddings({name: real}, model.config)
            parameter.register_hook(real.mul)


def rate_at(step: int, steps: int, peak: float) -> float:
    """Warm-up over 100 steps, then level, then down to nothing over the last 45 %."""
    return peak * min(1, (step + 1) / 100, (steps - step) / (0.45 * steps))


def main() -> None:
    """The command line: both phases of training, resumed where they stopped."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent, help="folder for the checkpoint")
    parser.add_argument("--run-dir", type=Path, default=Path(__file__).parent / ".run", help="where to resume from")
    parser.add_argument("--start", type=Path, help="folder of a checkpoint to train on from, instead of from nothing")
    parser.add_argument("--one-tile-steps", type=int, default=1800)
    parser.add_argument("--steps", type=int, default=3500, help="of both phases together")
    parser.add_argument("--pictures", type=int, default=48, help="per step")
    parser.add_argument("--rate", type=float, default=2e-3)
    parser.add_argument("--every", type=int, default=200, help="steps between saving and testing")
    options = parser.parse_args()
    options.run_dir.mkdir(parents=True, exist_ok=True)

    torch.manual_seed(0)
    if options.start:
        processor = AutoProcessor.from_pretrained(options.start)
        model = MllamaForConditionalGeneration.from_pretrained(options.start, dtype=torch.float32)
    else:
        tokenizer = make_tokenizer(corpus())
        processor, model = make_processor(tokenizer), make_model(tokenizer)
    tokenizer = processor.tokenizer
    keep_padding_alike(model)
    small = one_tile_tower(model.model.vision_model)
    for part in (model, small):
        part.set_attn_implementation("eager")  # on CPUs, SDPA's backward takes longer than all the matrix products
    patch_head = torch.nn.Linear(model.config.text_config.hidden_size, 1 + len(KINDS) * len(COLOURS) + len(PLACES))
    both, start = optimizers(model, patch_head, options.rate), 0
    state = options.run_dir / "state.pt"
    if state.exists():
        saved = torch.load(state, weights_only=True)
        if saved.get("begun_from") != str(options.start):
            parser.error(f"{state} is of a run that did not begin from {options.start}: delete it, or choose --run-dir")
        model.load_state_dict(saved["model"]), patch_head.load_state_dict(saved["patch_head"])
        [optimizer.load_state_dict(part) for optimizer, part in zip(both, saved["optimizers"], strict=True)]
        start = saved["step"]
    train = Batches(tokenizer, processor, seed=1 + start)
    began, losses = time.time(), []
    bar = tqdm(range(start, options.steps), initial=start, total=options.steps, mininterval=10)
    for step in bar:
        one_tile = step < options.one_tile_steps
        tower = small if one_tile else model.model.vision_model
        for optimizer in both:
            for group in optimizer.param_groups:
                group["lr"] = rate_at(step, options.steps, options.rate)
        with torch.autocast("cpu", torch.bfloat16):
            batch = train.pictures(options.pictures, one_tile)
            loss = loss_of(model, tower, batch, patch_head)
            if step % 8 == 0:  # without a picture the cross-attention layers are skipped: that has to be learned too
                talk = [train.conversation([pick(train.rng, *TEXT_ONLY)], image=False) for _ in range(8)]
                logits, labels, _ = answer_logits(model, train.rows(talk)[0])
                loss = loss + 0.1 * F.cross_entropy(logits.float(), labels)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in both:
            optimizer.step(), optimizer.zero_grad()
        losses.append(loss.item())
        if (step + 1) % options.every == 0 or step + 1 == options.steps:
            test = Batches(tokenizer, processor, seed=99, held_out=True)
            scores = held_out_accuracy(model, tower, test, one_tile)
            bar.write(
                f"step {step + 1}, {(time.time() - began) / 60:.1f} min, loss {np.mean(losses[-200:]):.4f}, "
                + ", ".join(f"{task} {100 * share:.1f}" for task, share in scores.items())
            )
            parts = {"model": model.state_dict(), "patch_head": patch_head.state_dict(), "step": step + 1}
            parts["begun_from"] = str(options.start)
            torch.save({**parts, "optimizers": [optimizer.state_dict() for optimizer in both]}, state)
            save(model, processor, options.run_dir / "checkpoint")
    save(model, processor, options.out)


if __name__ == "__main__":
    main()
