"""Sound and series nobody tuned on: gated relative biases, conformers, spectrogram patches, forecasting."""

from __future__ import annotations

from typing import Any

import torch
import transformers as tf

from models.families.family import BATCH, HEADS, INNER, LAYERS, VOCABULARY, WIDTH, Example, Form, create, token_ids
from models.families.heldout_common import First, HeldOut, model_of, values
from models.families.speech import SAMPLES, WAVEFORM

SOUND = {"input_name": "input_values", "axes": {0: "batch", 1: "samples"}}
SERIES = {
    "prediction_length": 4,
    "context_length": 8,
    "lags_sequence": [1, 2],
    "input_size": 1,
    "d_model": WIDTH,
    "encoder_layers": LAYERS,
    "decoder_layers": LAYERS,
    "encoder_attention_heads": HEADS,
    "decoder_attention_heads": HEADS,
    "encoder_ffn_dim": INNER,
    "decoder_ffn_dim": INNER,
    "num_time_features": 1,
    "num_static_categorical_features": 0,
    "num_parallel_samples": 2,
}
PATCHED = {
    "num_input_channels": 2,
    "context_length": 16,
    "patch_length": 4,
    "patch_stride": 4,
    "d_model": WIDTH,
    "num_attention_heads": HEADS,
    "num_hidden_layers": LAYERS,
    "ffn_dim": INNER,
}
SPEECH_TO_TEXT = {
    "vocab_size": VOCABULARY,
    "d_model": WIDTH,
    "encoder_layers": LAYERS,
    "decoder_layers": LAYERS,
    "encoder_attention_heads": HEADS,
    "decoder_attention_heads": HEADS,
    "encoder_ffn_dim": INNER,
    "decoder_ffn_dim": INNER,
    "max_source_positions": 64,
    "max_target_positions": 64,
    "conv_channels": 32,
    "input_feat_per_channel": 8,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 2,
}


def _spoken(name: str, kind: str, shape: tuple[int, ...], source: str, sdpa: bool = True, **options: Any) -> HeldOut:
    """Sound in, ids of a decoder in."""

    def make(form: Form) -> Example:
        names = (source, "decoder_input_ids")
        module = First(model_of(kind, form, **options), names, use_cache=False)
        axes = ({0: "batch"}, {0: "batch", 1: "dseq"})
        return Example(module, (torch.randn(BATCH, *shape), token_ids(7)), names, axes)

    return HeldOut(name, make, 3 * LAYERS, "bart", sdpa)


def _series(name: str, kind: str, attentions: int, negative: bool = False, **options: Any) -> HeldOut:
    """A past with observed marks, and features of the future."""

    def make(form: Form) -> Example:
        names = ("past_values", "past_time_features", "past_observed_mask", "future_values", "future_time_features")
        past = 10
        inputs = (
            torch.randn(BATCH, past).abs() + 1,
            torch.randn(BATCH, past, 1),
            torch.ones(BATCH, past),
            torch.randn(BATCH, 4),
            torch.randn(BATCH, 4, 1),
        )
        module = First(model_of(kind, form, **(SERIES | options)), names, use_cache=False)
        return Example(module, inputs, names, tuple({0: "batch"} for _ in names))

    return HeldOut(name, make, attentions, "bart", False, negative=negative)


def _speecht5(form: Form) -> Example:
    """The text encoder and the speech decoder."""
    sizes = {k: v for k, v in SPEECH_TO_TEXT.items() if "conv" not in k and "feat" not in k and k != "d_model"}
    config = tf.SpeechT5Config(
        hidden_size=WIDTH,
        num_mel_bins=8,
        speech_decoder_prenet_units=16,
        speech_decoder_postnet_units=16,
        speaker_embedding_dim=16,
        reduction_factor=1,
        max_text_positions=64,
        max_speech_positions=64,
        encoder_max_relative_position=6,
        **sizes,
    )
    from transformers.models.speecht5.modeling_speecht5 import SpeechT5EncoderWithTextPrenet

    names = ("input_values",)
    module = First(create(SpeechT5EncoderWithTextPrenet, config, "eager"), names)
    return Example(module, (token_ids(),), names, ({0: "batch", 1: "seq"},))


def _fastspeech(form: Form) -> Example:
    from transformers.models.fastspeech2_conformer.modeling_fastspeech2_conformer import FastSpeech2ConformerEncoder

    config = tf.FastSpeech2ConformerConfig(
        hidden_size=WIDTH,
        vocab_size=VOCABULARY,
        encoder_layers=LAYERS,
        encoder_num_attention_heads=HEADS,
        encoder_linear_units=INNER,
        encoder_kernel_size=3,
        decoder_num_attention_heads=HEADS,
    )
    module = FastSpeech2ConformerEncoder(config, config.encoder_config, use_encoder_input_layer=True)
    names = ("input_tensor",)
    return Example(First(module, names), (token_ids(),), names, ({0: "batch", 1: "seq"},))


def _decoder_of_sound(form: Form) -> Example:
    """MusicGen's decoder: codes of several books, attention to encoded text."""
    from transformers.models.musicgen.modeling_musicgen import MusicgenModel

    config = tf.MusicgenDecoderConfig(
        vocab_size=VOCABULARY,
        max_position_embeddings=64,
        num_hidden_layers=LAYERS,
        ffn_dim=INNER,
        num_attention_heads=HEADS,
        hidden_size=WIDTH,
        num_codebooks=2,
    )
    names = ("input_ids", "encoder_hidden_states")
    module = First(create(MusicgenModel, config, form), names, use_cache=False)
    inputs = (torch.randint(3, 100, (BATCH * 2, 7)), torch.randn(BATCH, 9, WIDTH))
    return Example(module, inputs, names, ({0: "books", 1: "dseq"}, {0: "batch", 1: "seq"}))


HELD_OUT_SPEECH = (
    values("hubert", "Hubert", 2, (SAMPLES,), **SOUND, **WAVEFORM),
    values("wavlm", "WavLM", 2, (SAMPLES,), sdpa=False, **SOUND, num_buckets=8, max_bucket_distance=16, **WAVEFORM),
    values("sew", "SEW", 2, (SAMPLES,), **SOUND, squeeze_factor=2, **(WAVEFORM | {"num_conv_pos_embeddings": 8})),
    values(
        "sew_d",
        "SEWD",
        2,
        (SAMPLES,),
        sdpa=False,
        **SOUND,
        squeeze_factor=2,
        max_position_embeddings=64,
        position_buckets=8,
        **WAVEFORM,
    ),
    values("unispeech", "UniSpeech", 2, (SAMPLES,), **SOUND, num_ctc_classes=20, **WAVEFORM),
    values("unispeech_sat", "UniSpeechSat", 2, (SAMPLES,), **SOUND, num_clusters=20, **WAVEFORM),
    values(
        "data2vec_audio",
        "Data2VecAudio",
        2,
        (SAMPLES,),
        **SOUND,
        conv_pos_kernel_size=3,
        **{k: v for k, v in WAVEFORM.items() if k != "num_conv_pos_embeddings"},
    ),
    values(
        "wav2vec2_bert",
        "Wav2Vec2Bert",
        2,
        (30, 16),
        sdpa=False,
        input_name="input_features",
        axes={0: "batch", 1: "frames"},
        hidden_size=WIDTH,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        intermediate_size=INNER,
        feature_projection_input_dim=16,
        conv_depthwise_kernel_size=3,
        left_max_position_embeddings=6,
        right_max_position_embeddings=4,
    ),
    values(
        "conformer_rotary",
        "Wav2Vec2Conformer",
        2,
        (SAMPLES,),
        sdpa=False,
        **SOUND,
        position_embeddings_type="rotary",
        conv_depthwise_kernel_size=5,
        **WAVEFORM,
    ),
    values(
        "ast",
        "AST",
        2,
        (32, 16),
        input_name="input_values",
        hidden_size=WIDTH,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        intermediate_size=INNER,
        patch_size=8,
        frequency_stride=4,
        time_stride=4,
        max_length=32,
        num_mel_bins=16,
    ),
    values(
        "encodec",
        "Encodec",
        0,
        (1, 320),
        input_name="input_values",
        sdpa=False,
        negative=True,
        num_filters=4,
        hidden_size=16,
        upsampling_ratios=[4, 2],
        num_lstm_layers=1,
        codebook_size=16,
        codebook_dim=16,
        target_bandwidths=[24.0],
        normalize=False,
    ),
    values(
        "parakeet",
        "ParakeetEncoder",
        2,
        (64, 16),
        input_name="input_features",
        model="",
        config="ParakeetEncoder",
        hidden_size=WIDTH,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        intermediate_size=INNER,
        num_mel_bins=16,
        subsampling_conv_channels=8,
        conv_kernel_size=3,
    ),
    _spoken(
        "moonshine",
        "Moonshine",
        (1200,),
        "input_values",
        vocab_size=VOCABULARY,
        hidden_size=WIDTH,
        intermediate_size=INNER,
        encoder_num_hidden_layers=LAYERS,
        decoder_num_hidden_layers=LAYERS,
        encoder_num_attention_heads=HEADS,
        decoder_num_attention_heads=HEADS,
        encoder_num_key_value_heads=HEADS,
        decoder_num_key_value_heads=HEADS,
        max_position_embeddings=64,
    ),
    _spoken("speech_to_text", "Speech2Text", (32, 8), "input_features", sdpa=False, **SPEECH_TO_TEXT),
    HeldOut("speecht5_encoder", _speecht5, LAYERS, sdpa=False),
    HeldOut("fastspeech2_conformer", _fastspeech, LAYERS, sdpa=False),
    HeldOut("musicgen", _decoder_of_sound, 2 * LAYERS),
    _series("time_series_transformer", "TimeSeriesTransformer", 6),
    _series("informer", "Informer", 6),
    values("patchtst", "PatchTST", 2, (16, 2), input_name="past_values", sdpa=False, **PATCHED),
    values(
        "patchtsmixer",
        "PatchTSMixer",
        0,
        (16, 2),
        input_name="past_values",
        sdpa=False,
        negative=True,
        context_length=16,
        patch_length=4,
        patch_stride=4,
        num_input_channels=2,
        d_model=16,
        num_layers=2,
        gated_attn=True,
    ),
)
