"""Tiny pipelines of diffusers with random weights: a UNet's, a transformer's, and one without prompts."""

import diffusers
import torch
import transformers
from tiny import make_tokenizer

PROMPT = "The Eiffel Tower"
OTHER = "Rome"
UNET = {
    "block_out_channels": (8, 16),
    "layers_per_block": 1,
    "in_channels": 4,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
    "cross_attention_dim": 16,
    "attention_head_dim": 4,
    "norm_num_groups": 4,
}


def tokenizer():
    found = make_tokenizer()
    found.pad_token, found.model_max_length = found.eos_token, 16
    return found


def vae():
    return diffusers.AutoencoderKL(
        block_out_channels=[8, 8],
        down_block_types=["DownEncoderBlock2D"] * 2,
        up_block_types=["UpDecoderBlock2D"] * 2,
        latent_channels=4,
        norm_num_groups=4,
    ).eval()


def text_encoder(width=16):
    config = transformers.CLIPTextConfig(
        hidden_size=width,
        intermediate_size=32,
        num_attention_heads=2,
        num_hidden_layers=2,
        vocab_size=320,
        projection_dim=width,
        max_position_embeddings=16,
        eos_token_id=0,
        bos_token_id=0,
        pad_token_id=0,
    )
    return transformers.CLIPTextModel(config).eval()


def unet():
    return diffusers.UNet2DConditionModel(
        **UNET, sample_size=8, out_channels=4, up_block_types=("CrossAttnUpBlock2D", "UpBlock2D")
    ).eval()


def quiet(pipeline):
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def stable_diffusion(scheduler=None, kind=None, **others):
    torch.manual_seed(0)
    return quiet(
        (kind or diffusers.StableDiffusionPipeline)(
            unet=unet(),
            vae=vae(),
            text_encoder=text_encoder(),
            tokenizer=tokenizer(),
            scheduler=scheduler or diffusers.DDIMScheduler(steps_offset=1, clip_sample=False),
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
            **others,
        )
    )


def flux():
    torch.manual_seed(0)
    t5 = transformers.T5Config(vocab_size=320, d_model=32, d_kv=8, d_ff=32, num_layers=2, num_heads=2)
    return quiet(
        diffusers.FluxPipeline(
            scheduler=diffusers.FlowMatchEulerDiscreteScheduler(),
            text_encoder=text_encoder(32),
            text_encoder_2=transformers.T5EncoderModel(t5).eval(),
            tokenizer=tokenizer(),
            tokenizer_2=tokenizer(),
            transformer=diffusers.FluxTransformer2DModel(
                in_channels=4,
                num_layers=1,
                num_single_layers=1,
                attention_head_dim=16,
                num_attention_heads=2,
                joint_attention_dim=32,
                pooled_projection_dim=32,
                axes_dims_rope=[4, 4, 8],
            ).eval(),
            vae=diffusers.AutoencoderKL(
                block_out_channels=(4,),
                layers_per_block=1,
                latent_channels=1,
                norm_num_groups=1,
                use_quant_conv=False,
                use_post_quant_conv=False,
                shift_factor=0.06,
                scaling_factor=1.5,
            ).eval(),
        )
    )


def unconditional():
    torch.manual_seed(0)
    net = diffusers.UNet2DModel(
        block_out_channels=(8, 16),
        layers_per_block=1,
        norm_num_groups=4,
        sample_size=8,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
    )
    return quiet(diffusers.DDPMPipeline(unet=net.eval(), scheduler=diffusers.DDPMScheduler()))


SHORT = {"num_inference_steps": 3, "output_type": "np"}
FLUX = {"num_inference_steps": 2, "height": 8, "width": 8, "max_sequence_length": 16, "output_type": "np"}
