"""The model card that pretraining writes: how a base model was made, what it scores, what silence costs it."""
from __future__ import annotations


def text(card: dict) -> str:
    """README.md of what card.json holds."""
    price = card["price_of_silence_nats"]
    verdict = ("No transcript has that many turns." if not card["price_of_silence_episodes"] else
               "It gets cheaper with repetition: the model continues the pattern." if price[-1] < 0.5 * price[0] else
               "It does not get much cheaper with repetition: this model is too weak to continue the pattern, so it\n"
               "cannot show the paper's cheap silence.")
    title = "The embedded base model" if card["member"] is None else f"Imitator {card['member']} of an ensemble"
    used, by_seed = f"{card['train_conversations']:,} conversations", "initialisation, order of the batches"
    if card["bootstrap"]:
        used = f"{used} drawn with replacement, {card['train_conversations_distinct']:,} of them distinct"
        by_seed = f"{by_seed}, draw of the conversations"
    return f"""# {title}

A Llama-style decoder of {card['parameters']:,} parameters (bfloat16), context {card['context']} tokens, byte-level BPE.
Made by `{card['command']}`. It is a small, real model of human small talk
for experiments on KL-regularised RL, and of no use as a chat model.

| | |
|---|---|
| data | {card['data']}: {card['conversations']:,} conversations, {card['messages']:,} messages |
| used | those with at least two turns: {used}, {card['train_tokens']:,} tokens |
| held out | {card['held_out_conversations']} conversations, chosen by a hash of their identifier (`held_out.jsonl`) |
| format | one turn a line, speakers `A:` and `B:`, consecutive messages of one speaker joined |
| tokenizer | {'that of the embedded model' if card['tokenizer'] else 'trained on all training conversations'} |
| empty human messages | {card['empty_messages']} of {card['messages']:,} |
| empty human turns, held out | {card['human_empty_turns']} of {card['human_turns']:,} |
| held-out loss | {card['nats_per_token']:.3f} nats per token, {card['bits_per_character']:.3f} bits per character \
({card['characters_per_token']:.2f} characters per token) |
| seed | {card['seed']} ({by_seed}) |
| training | {card['steps']:,} steps, {card['tokens_seen']:,} tokens, {card['minutes']:.0f} minutes on \
{card['machine']} |
| licence | {card['licence']} |

## The price of silence
-log beta of an empty turn of A, turn after turn, in nats: mean over the {card['price_of_silence_episodes']} of 512
transcripts whose ten turns fit the context (held-out openings of two turns; B answers by sampling from the model):

{' '.join(f'{x:.2f}' for x in price)}

{verdict}
"""
