"""Initialize the LoRA factors of a PEFT model that is already loaded, in place.

    python examples/in_place.py MODEL --data train.txt --output initial

Use this for a model that another library loads, such as Unsloth, or for a base that was saved quantized.
"""

import argparse

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

import quailora


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default="HuggingFaceTB/SmolLM2-135M-Instruct")
    parser.add_argument("--data", default="tatsu-lab/alpaca", help="what to calibrate on: a file or a data set")
    parser.add_argument("--output", default="initial", help="folder for the initialized adapter")
    parser.add_argument("--rank", type=int, default=64)
    parser.add_argument("--samples", type=int, default=64, help="calibration sequences")
    arguments = parser.parse_args()

    quantization = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )
    base = AutoModelForCausalLM.from_pretrained(arguments.model, quantization_config=quantization)
    lora = LoraConfig(r=arguments.rank, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")
    model = get_peft_model(base, lora)

    # The full-precision weights are read from the checkpoint, one block at a time.
    report = quailora.initialize(
        model, arguments.data, checkpoint=arguments.model, samples=arguments.samples, sequence_length=512
    )
    print(report.to_markdown())

    # Save the initialized adapter before training: `merge` and `convert` need it afterwards.
    model.save_pretrained(arguments.output)
    report.save(arguments.output)  # also records which base it was made for


if __name__ == "__main__":
    main()
