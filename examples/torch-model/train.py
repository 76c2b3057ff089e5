"""Train the model on a few sentences, in some seconds, and write `language.pt`: `python train.py`."""

from __future__ import annotations

import torch
from language import LANGUAGES, Network
from torch.nn.functional import cross_entropy

SENTENCES = {
    "english": """
        The train to the city leaves at eight in the morning.
        I would like a cup of coffee with milk, please.
        She does not know where her brother lives now.
        What is the name of the street behind the school?
        They have been waiting for the rain since yesterday.
        This is the best book that I have read this year.
    """,
    "french": """
        Le train pour la ville part à huit heures du matin.
        Je voudrais une tasse de café avec du lait, s'il vous plaît.
        Elle ne sait pas où habite son frère maintenant.
        Comment s'appelle la rue qui est derrière l'école ?
        Ils attendent la pluie depuis hier.
        C'est le meilleur livre que j'ai lu cette année.
    """,
    "german": """
        Der Zug in die Stadt fährt um acht Uhr morgens ab.
        Ich hätte gern eine Tasse Kaffee mit Milch, bitte.
        Sie weiß nicht, wo ihr Bruder jetzt wohnt.
        Wie heißt die Straße, die hinter der Schule liegt?
        Sie warten schon seit gestern auf den Regen.
        Das ist das beste Buch, das ich dieses Jahr gelesen habe.
    """,
    "spanish": """
        El tren a la ciudad sale a las ocho de la mañana.
        Quisiera una taza de café con leche, por favor.
        Ella no sabe dónde vive ahora su hermano.
        ¿Cómo se llama la calle que está detrás de la escuela?
        Están esperando la lluvia desde ayer.
        Este es el mejor libro que he leído este año.
    """,
}

#: The bytes of a piece of text, the pieces in one step, and the steps.
LENGTH, PIECES, STEPS = 24, 64, 150

windows = [torch.tensor(list(SENTENCES[name].encode())).unfold(0, LENGTH, 1) for name in LANGUAGES]
pieces = torch.cat(windows)
labels = torch.cat([torch.full([len(one)], number) for number, one in enumerate(windows)])

torch.manual_seed(0)
network = Network()
optimizer = torch.optim.Adam(network.parameters(), lr=0.01)
for _ in range(STEPS):
    chosen = torch.randint(len(pieces), [PIECES])
    loss = cross_entropy(network(pieces[chosen]), labels[chosen])
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
torch.save(network.state_dict(), "language.pt")
print("language.pt is written")
