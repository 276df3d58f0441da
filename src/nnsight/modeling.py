"""A name of the existing package: importing it says where its names are here."""

from nnsight.absent import refuse_import

raise refuse_import(__name__)
