"""Make an adapter, load it on its quantized base, and compare perplexities.

    python examples/quickstart.py MODEL --data train.txt --held-out test.txt

MODEL is a full-precision causal language model: a folder, or an id on the Hugging Face hub.
"""

import argparse

import torch
from peft import LoraConfig, PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

import quailora
from quailora.calibration.data import load_calibration


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default="HuggingFaceTB/SmolLM2-135M-Instruct")
    parser.add_argument("--data", default="tatsu-lab/alpaca", help="what to calibrate on: a file or a data set")
    parser.add_argument("--held-out", help="text file to measure perplexity on")
    parser.add_argument("--output", default="initial", help="folder for the adapter")
    parser.add_argument("--rank", type=int, default=64)
    parser.add_argument("--samples", type=int, default=64, help="calibration sequences")
    arguments = parser.parse_args()

    quantization = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )
    lora = LoraConfig(r=arguments.rank, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")
    report = quailora.build_adapter(
        arguments.model,
        lora,
        arguments.data,
        arguments.output,
        quantization=quantization,
        samples=arguments.samples,
        sequence_length=512,
    )
    print(report.to_markdown())

    base = AutoModelForCausalLM.from_pretrained(arguments.model, quantization_config=quantization)
    quailora.check_base(base, arguments.output)  # raises an error if the adapter was made for another base
    model = PeftModel.from_pretrained(base, arguments.output, is_trainable=True)  # ready for training

    if arguments.held_out:
        tokenizer = AutoTokenizer.from_pretrained(arguments.model)
        text = load_calibration(arguments.held_out, tokenizer, samples=16, sequence_length=512)
        print(f"quantized + adapter: {quailora.evaluate.perplexity(model, text.batches(8)):.3f}")
        with model.disable_adapter():
            print(f"quantized:           {quailora.evaluate.perplexity(model, text.batches(8)):.3f}")


if __name__ == "__main__":
    main()
