"""QLoRA fine-tuning with TRL from a QuAILoRA initialization.

    python examples/trl_finetune.py MODEL --data train.jsonl --output trained

Make the adapter once, in one process. The training part can then be run again, or by several processes.
"""

import argparse
from pathlib import Path

import torch
from datasets import Dataset, load_dataset
from peft import LoraConfig, PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig
from trl import SFTConfig, SFTTrainer

import quailora


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default="HuggingFaceTB/SmolLM2-135M-Instruct")
    parser.add_argument("--data", help="JSON or JSONL file whose records have a field `text`; default: Alpaca")
    parser.add_argument("--initial", default="initial", help="folder of the initialized adapter, made if missing")
    parser.add_argument("--output", default="trained", help="folder for the trained adapter")
    parser.add_argument("--rank", type=int, default=64)
    parser.add_argument("--learning-rate", type=float, default=2e-4)
    parser.add_argument("--freeze", action="store_true", help="keep the initialized adapter, and train another on top")
    parser.add_argument("--max-steps", type=int, default=-1, help="default: one epoch")
    arguments = parser.parse_args()

    quantization = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )
    data = Dataset.from_json(arguments.data) if arguments.data else load_dataset("tatsu-lab/alpaca", split="train")
    data = data.select_columns("text")

    if not Path(arguments.initial).exists():
        lora = LoraConfig(r=arguments.rank, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")
        # With alpha matched, a learning rate that was tuned for QLoRA suits the adapter.
        quailora.build_adapter(
            arguments.model, lora, data, arguments.initial, quantization=quantization, alpha="matched"
        )

    base = AutoModelForCausalLM.from_pretrained(arguments.model, quantization_config=quantization)
    quailora.check_base(base, arguments.initial)
    if arguments.freeze:
        model = quailora.freeze_correction(base, arguments.initial)
    else:
        model = PeftModel.from_pretrained(base, arguments.initial, is_trainable=True)
    trainer = SFTTrainer(
        model,  # a PeftModel, and therefore no peft_config
        args=SFTConfig(
            arguments.output,
            num_train_epochs=1,
            max_steps=arguments.max_steps,
            per_device_train_batch_size=4,
            gradient_accumulation_steps=4,
            learning_rate=arguments.learning_rate,
            warmup_steps=0.03,  # below 1: a share of all steps
            report_to="none",
            use_cpu=not torch.cuda.is_available(),
        ),
        train_dataset=data,
        processing_class=AutoTokenizer.from_pretrained(arguments.model),
    )
    # TRL casts the factors of a 4-bit model to bf16. Without --freeze both are far from zero here, so most of Adam's
    # steps are smaller than half the distance to the next bf16 number, and would be rounded away.
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    trainer.train()
    trainer.save_model()


if __name__ == "__main__":
    main()
