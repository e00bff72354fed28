"""Write the support data set: short customer messages, each with one JSON object as its answer.

    python scripts/make_support_data.py            # writes recipes/data/support/{train,test}.jsonl
    python scripts/make_support_data.py --check    # exit 1 when the files differ from that

A message is made of whole sentences: what is wrong, sometimes what is asked for, sometimes how
much it hurries. Each sentence states its own label, so that a careful reader can always find it.
Train and test share no product, no sentence and no greeting. The keys and their values stand in
the recipes as `data.system`, which adapter and base both get. The text was written for lorakit, no
name in it is a real company's, and it is under lorakit's licence (Apache-2.0).
"""

import json
import random
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

FOLDER = Path(__file__).parents[1] / "recipes" / "data" / "support"
SEED = 7
ROWS = {"train": 400, "test": 100}
REFUNDABLE = ("billing", "delivery", "defect")


@dataclass(frozen=True)
class Wording:
    """The sentences and names of one split. `problems` and `hurry` are keyed by their label."""

    makers: tuple[str, ...]
    things: tuple[str, ...]
    greetings: tuple[str, ...]
    closings: tuple[str, ...]
    problems: dict[str, tuple[str, ...]]
    hurry: dict[str, tuple[str, ...]]
    refund: tuple[str, ...]
    no_refund: tuple[str, ...]


TRAIN = Wording(
    makers=tuple(
        "Avenlo Brixoma Corvane Dunmeer Eltrano Farnolo Gantvik Hollowin Ivenna Jorvelle Kestrino "
        "Lumbary Mirotan Norvick Ostrelle Pellimar Quandor Rivanto Solmeck Tarvenne Ulbrico "
        "Vantoro Wendrose Yarrolin Zefnola".split()
    ),
    things=(
        *"Kettle Lamp Blender Keyboard Heater Scale Speaker Router Vacuum Drill Monitor".split(),
        *"Toaster Camera Fan Mixer Printer Radio Iron Shaver Scanner Charger Fridge".split(),
        *("Coffee Maker", "Alarm Clock"),
    ),
    greetings=("Hello!", "Hi there!", "Good morning.", "Dear team!", "Hi.", "Hello support team."),
    closings=(
        "Thank you.",
        "Thanks for your help.",
        "Best regards, Ana.",
        "Have a nice day.",
        "Kind regards.",
        "Looking forward to your answer.",
    ),
    problems={
        "billing": (
            "I was charged twice for the {}.",
            "My card shows two payments for one {}.",
            "The invoice for my {} lists a price I never agreed to.",
            "You billed me the full price for the {} although I used a discount code.",
            "There is a fee on my bill for the {} that nobody can explain.",
            "I cancelled the {} last week and was still charged.",
            "My gift card was not taken off the total for the {}.",
            "The amount you took for the {} is higher than the price on the page.",
            "Why did you bill me again for the {}?",
            "The tax on my {} invoice is wrong.",
            "Your invoice charges me for three units of the {}, and I bought one.",
            "The sale price of the {} is missing from my receipt.",
            "I see an extra payment for the {} on my bank statement.",
            "The bill for my {} is 30 dollars too high.",
        ),
        "delivery": (
            "My {} has not arrived yet.",
            "The {} was due on Monday and there is still no parcel.",
            "Tracking for my {} has not moved in six days.",
            "The courier says the {} was delivered, but nobody here received it.",
            "Where is the {} I ordered two weeks ago?",
            "My {} went to my old address.",
            "The parcel with the {} seems to be lost.",
            "I am still waiting for the {} to be shipped.",
            "The driver left without handing over the {}.",
            "You sent the {} to the wrong city.",
            "The delivery date of my {} has been pushed back three times.",
            "The shipment with the {} is stuck at customs.",
            "I paid for next-day delivery of the {} and that was a week ago.",
            "There is still no sign of the {} at the pick-up point.",
        ),
        "defect": (
            "My {} stopped working after two days.",
            "The {} arrived with a crack down the side.",
            "The {} will not switch on any more.",
            "My {} makes a loud grinding noise.",
            "A button on the {} is stuck.",
            "The {} gets far too hot when I use it.",
            "The light on my {} flickers and then it shuts down.",
            "My {} broke the first time I used it.",
            "One part of the {} was snapped off in the box.",
            "The {} smells of burnt plastic.",
            "The {} turns itself off every few minutes.",
            "The lid of my {} came off.",
            "The power cord of the {} is torn.",
            "My {} is broken again.",
        ),
        "account": (
            "I cannot log in to the app for my {}.",
            "The password reset mail for my {} account never comes.",
            "Your site says my login for the {} is locked.",
            "Please change the e-mail address on the account with my {}.",
            "I forgot the password I set when I registered the {}.",
            "My account no longer lists the {}.",
            "The {} app asks for a code that I do not get.",
            "Please delete the profile I made for the {}.",
            "I need to move my {} to a different user account.",
            "Signing in to register the {} ends with an error.",
            "The name on my {} account is misspelt.",
            "My {} login stopped being accepted.",
            "Someone else is signed in to my {} account.",
            "I have two accounts for one {}, please join them.",
        ),
        "question": (
            "Does the {} work with 110 volts?",
            "Which colours does the {} come in?",
            "How long is the warranty on the {}?",
            "Can I use the {} outdoors?",
            "Is the {} still available in the large size?",
            "What does the {} weigh?",
            "Do you sell spare filters for the {}?",
            "How do I clean the {}?",
            "Is there a manual for the {} in Spanish?",
            "Will the {} fit on a narrow shelf?",
            "What comes in the box with the {}?",
            "Does the {} need a special cable?",
            "How much power does the {} use?",
            "Is the {} loud?",
        ),
    },
    hurry={
        "high": (
            "This is urgent.",
            "I need an answer today.",
            "Please reply right away.",
            "It has to be solved by tomorrow.",
            "Please treat this as an emergency.",
            "I cannot wait any longer.",
            "As soon as possible, please.",
            "Please hurry.",
            "I need this settled immediately.",
            "It is extremely urgent!",
            "I have to know within two hours.",
            "I need help now!",
        ),
        "low": (
            "There is no rush.",
            "It can wait until next week.",
            "Answer whenever you have time.",
            "No hurry at all.",
            "Take your time.",
            "Reply when it suits you.",
            "This is not urgent.",
            "Any time this month is fine.",
            "I am in no hurry.",
            "You can deal with this later.",
            "It is not important right now.",
            "No stress, next week is fine.",
        ),
    },
    refund=(
        "I want my money back.",
        "Please refund me.",
        "Please send the money back to my card.",
        "I would like a full refund.",
        "Can you return what I paid?",
        "I expect to get my payment back.",
        "Please give me a refund.",
        "I am asking for my money back.",
        "Kindly refund the amount.",
        "Just pay me back.",
    ),
    no_refund=(
        "I do not want a refund.",
        "No refund needed, just put it right.",
        "I do not need the money back.",
        "Please sort this out.",
        "Please look into it.",
        "What can you do about it?",
        "Please let me know what happens next.",
        "I only want this put right.",
        "Please assist.",
        "Can you check?",
    ),
)

TEST = Wording(
    makers=tuple(
        "Ambrix Belqua Cindral Drovanne Esterlo Glimmet Hesperoy Ilmaro Jundery Krellin Morvanti "
        "Plimsy Tollwyn Undaro".split()
    ),
    things=(
        *"Juicer Projector Thermostat Tablet Doorbell Microphone Treadmill Headset".split(),
        *("Rice Cooker", "Hair Dryer", "Air Purifier", "Sewing Machine"),
    ),
    greetings=("Good evening.", "Hey!", "Dear support!", "Good day."),
    closings=("Many thanks.", "Cheers, Tom.", "Thanks in advance.", "All the best."),
    problems={
        "billing": (
            "My statement has the payment for the {} on it two times.",
            "You took 20 euros too much for the {}.",
            "The promo code was ignored when I paid for the {}.",
            "I got a bill for the {} after I called the order off.",
            "The receipt for the {} shows the wrong sum.",
            "Somebody put a service charge on my {} bill.",
            "I keep being charged every month for the {}, which I paid in full.",
            "The price you debited for the {} does not match the offer.",
        ),
        "delivery": (
            "The {} still is not here.",
            "It has been ten days and my {} has not turned up.",
            "The package with my {} was handed to a stranger.",
            "The tracking page for the {} has shown nothing new since Tuesday.",
            "My {} should have come on Friday, but the doorstep is empty.",
            "The post office has no record of the {} parcel.",
            "My order for the {} has not left your warehouse.",
            "The van drove past and took my {} back to the depot.",
        ),
        "defect": (
            "The {} died on the third day.",
            "My {} came out of the box in pieces.",
            "The {} buzzes and shakes whenever it runs.",
            "Nothing happens when I press the power button on the {}.",
            "There is a dent in the {} and the cover does not close.",
            "My {} overheats within a minute.",
            "The {} I unpacked this morning is faulty.",
            "My {} cuts out again and again.",
        ),
        "account": (
            "The {} app rejects my password.",
            "I am locked out of the profile that belongs to my {}.",
            "Please update the e-mail on my {} login.",
            "No verification code reaches me when I sign in for the {}.",
            "I want my {} user profile removed.",
            "My username for the {} is not recognised.",
            "Logging in to the {} page just loops back to the start.",
            "Please merge both of my {} logins.",
        ),
        "question": (
            "Could you tell me how wide the {} is?",
            "Are spare parts sold for the {}?",
            "Is the {} safe around small children?",
            "What is new in the {} since last year?",
            "Can the {} be used in Japan?",
            "How many years of guarantee does the {} have?",
            "Where can I find instructions for the {}?",
            "Does the {} come in white?",
        ),
    },
    hurry={
        "high": (
            "Please be quick, I need this tonight.",
            "This cannot wait.",
            "Urgent, please help!",
            "I must have a solution within the hour.",
            "Please answer immediately.",
            "I need help straight away.",
            "It is really pressing.",
            "ASAP please.",
        ),
        "low": (
            "No need to hurry.",
            "It is not pressing.",
            "Next month is fine too.",
            "Please do not rush.",
            "A reply some time later is enough.",
            "This is far from urgent.",
            "Whenever it is convenient for you.",
            "It can wait.",
        ),
    },
    refund=(
        "I would like to be refunded.",
        "Please transfer the money back to me.",
        "Can I have my money back?",
        "A refund is what I want.",
        "Return my payment, please.",
        "Please give back what I paid.",
    ),
    no_refund=(
        "I am not asking for a refund.",
        "A refund is not necessary.",
        "Please fix this.",
        "Please find out what went wrong.",
        "Tell me what the next step is.",
        "I just want it solved.",
    ),
)

WORDINGS = {"train": TRAIN, "test": TEST}


def rows(split: str) -> Iterator[dict[str, object]]:
    """Yield the rows of a split: labels in balance, no message twice, the same ones every time."""
    wording, draw = WORDINGS[split], random.Random(f"{SEED} {split}")
    seen: set[str] = set()
    while len(seen) < ROWS[split]:
        category = tuple(wording.problems)[len(seen) % len(wording.problems)]
        urgency = draw.choice(("low", "normal", "high"))
        refund = category in REFUNDABLE and draw.random() < 0.5
        product = f"{draw.choice(wording.makers)} {draw.choice(wording.things)}"
        message = _message(wording, category, urgency, refund, product, draw)
        if message not in seen:
            seen.add(message)
            yield _row(message, category=category, urgency=urgency, product=product, refund=refund)


def _message(
    wording: Wording, category: str, urgency: str, refund: bool, product: str, draw: random.Random
) -> str:
    parts = [draw.choice(wording.problems[category])]
    if refund:
        parts.append(draw.choice(wording.refund))
    elif category in REFUNDABLE and draw.random() < 0.6:
        parts.append(draw.choice(wording.no_refund))
    if urgency != "normal":
        parts.insert(draw.choice((0, len(parts), len(parts))), draw.choice(wording.hurry[urgency]))
    if draw.random() < 0.3:
        parts.insert(0, draw.choice(wording.greetings))
    if draw.random() < 0.3:
        parts.append(draw.choice(wording.closings))
    text = " ".join(parts)
    if draw.random() < 0.2:  # as people write on a phone
        text = ", ".join(part.rstrip(".!?") for part in parts).lower()
    return text.format(product)


def _row(message: str, **answer: object) -> dict[str, object]:
    contents = {"user": message, "assistant": json.dumps(answer)}
    return {"messages": [{"role": role, "content": text} for role, text in contents.items()]}


def main(arguments: list[str]) -> int:
    """Write the files, or with --check say whether they are up to date."""
    stale = 0
    FOLDER.mkdir(parents=True, exist_ok=True)
    for split in WORDINGS:
        path = FOLDER / f"{split}.jsonl"
        text = "".join(json.dumps(row) + "\n" for row in rows(split))
        if arguments == ["--check"]:
            if not path.is_file() or path.read_text(encoding="utf-8") != text:
                print(f"{path} is not what {Path(__file__).name} writes; run it", file=sys.stderr)
                stale = 1
        else:
            path.write_text(text, encoding="utf-8")
    return stale


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
