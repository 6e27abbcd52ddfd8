"""UniTokProcessor under transformers' own tests of processors."""

import unittest

from transformers_tests.test_processing_common import ProcessorTesterMixin

from unitok_hf import UniTokImageProcessor, UniTokProcessor, add_special_tokens
from unitok_hf.training.gpt_trainer import train_text_tokenizer


CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{{ message.role }}: {% for part in message.content %}"
    "{% if part.type == 'image' %}{{ '<|image|>' }}{% else %}{{ part.text }}{% endif %}{% endfor %}"
    "{% if not (loop.last and continue_final_message) %}{{ eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)


class UniTokProcessorTest(ProcessorTesterMixin, unittest.TestCase):
    """What transformers asks of every processor."""

    processor_class = UniTokProcessor

    @classmethod
    def _setup_tokenizer(cls):
        return add_special_tokens(train_text_tokenizer(["lower newer", "upper older longer string"], 300))

    @classmethod
    def _setup_image_processor(cls):
        return UniTokImageProcessor(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16})

    @staticmethod
    def prepare_processor_dict():
        return {"chat_template": CHAT_TEMPLATE, "num_image_tokens": 4}

    def test_if_input_has_mismatching_tokens_and_mm_data(self):
        """Refused before theirs would be, sample by sample, in words that say which differs."""
        images = [[image] for image in self.prepare_images_inputs(batch_size=4)]
        text = self.prepare_text_inputs(batch_size=3, modalities=["image"])
        with self.assertRaisesRegex(ValueError, "3 texts, but images for 4 samples"):
            self.get_processor()(images=images, text=text, return_tensors="pt")
        with self.assertRaisesRegex(ValueError, "text 0 has 1 .*, but 2 images"):
            self.get_processor()(images=[images[0] * 2, *images[1:3]], text=text, return_tensors="pt")
