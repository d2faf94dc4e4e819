"""How many drafts the demo checkpoint accepts: of prompt lookup, and of a draft model.

    python -m benchmarks.drafts [--model-dir DIR] [--questions 100] [--draft-model DIR/draft]

The first question about a picture has nothing to copy from. Asked again in the same conversation, its answer is there.
"""

import argparse
from pathlib import Path

from tqdm.auto import tqdm
from transformers import AutoProcessor

from demo_model.evaluate import heldout_samples
from ov_mllama.runtime.model import OVMLlamaForConditionalGeneration
from ov_mllama.runtime.speculative import OVDraftModel
from ov_mllama.runtime.stats import GenerationStats

GREEDY = {"do_sample": False, "max_new_tokens": 60}


def ask(model, processor, messages: list[dict], image, **drafts) -> tuple[str, GenerationStats]:
    """The answer to a conversation about one picture, and what it cost.

    Args:
        drafts: of `generate`, how to draft; nothing for plain decoding.
    """
    text = processor.apply_chat_template(messages, add_generation_prompt=True)
    inputs = processor(text=text, images=[image], add_special_tokens=False, return_tensors="pt")
    output = model.generate(**inputs, **GREEDY, **drafts)
    answer = processor.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return answer, model.stats


def main() -> None:
    """The command line: asks each question twice, with and without drafts, and prints the shares."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model-dir", type=Path, default=Path("models/demo_model"))
    parser.add_argument("--questions", type=int, default=100)
    parser.add_argument("--drafts", type=int, default=5)
    parser.add_argument("--draft-model", type=Path, help="folder of make_draft_model; default: prompt lookup")
    options = parser.parse_args()
    drafts = {"prompt_lookup_num_tokens": options.drafts}
    if options.draft_model:
        drafts = {"assistant_model": OVDraftModel(options.draft_model, drafts=options.drafts)}
    model = OVMLlamaForConditionalGeneration(options.model_dir, ov_config={"EXECUTION_MODE_HINT": "ACCURACY"})
    processor = AutoProcessor.from_pretrained(options.model_dir)
    costs, different = {"first question": [], "asked again": []}, 0
    for sample in tqdm(list(heldout_samples(options.questions)), leave=False):
        question = [{"type": "text", "text": sample["question"]}]
        messages = [{"role": "user", "content": [{"type": "image"}, *question]}]
        for task in costs:
            expected, _ = ask(model, processor, messages, sample["image"])
            answer, stats = ask(model, processor, messages, sample["image"], **drafts)
            different += answer != expected
            costs[task].append(stats)
            messages += [{"role": "assistant", "content": [{"type": "text", "text": answer}]}]
            messages += [{"role": "user", "content": question}]
    for task, stats in costs.items():
        drafted, accepted = (sum(getattr(stat, f"{what}_tokens") for stat in stats) for what in ("drafted", "accepted"))
        steps = sum(1 + len(stat.step_s) for stat in stats)
        tokens = sum(stat.new_tokens for stat in stats)
        share = f"{100 * accepted / drafted:.0f} %" if drafted else "none"
        print(f"{task}: {accepted} of {drafted} drafts accepted ({share}); {tokens / steps:.2f} tokens a step")
    print(f"{different} of {2 * options.questions} answers differ from those without drafts")


if __name__ == "__main__":
    main()
