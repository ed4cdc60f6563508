TEMPLATES: tuple[str, ...] = (
    "When {A} and {B} went to the {place}, {S} gave a {gift} to",
    "Then, {A} and {B} went to the {place}. {S} gave a {gift} to",
    "Then, {A} and {B} had a lot of fun at the {place}. {S} gave a {gift} to",
    "Then, {A} and {B} were working at the {place}. {S} decided to give a {gift} to",
    "After {A} and {B} went to the {place}, {S} gave a {gift} to",
    "While {A} and {B} were working at the {place}, {S} gave a {gift} to",
    "When {A} and {B} got a {gift} at the {place}, {S} decided to give it to",
    "Afterwards, {A} and {B} went to the {place}. {S} handed a {gift} to",
    "After the lunch, {A} and {B} went to the {place}. {S} gave a {gift} to",
    "Friends {A} and {B} found a {gift} at the {place}. {S} gave it to",
    "The {place} that {A} and {B} went to had a {gift}. {S} gave it to",
    "Then, {A} and {B} had a long argument, and afterwards {S} said to",
)
